"""Many small models on one device: the engine behind the sweeps.

A model of a few hundred thousand parameters leaves a GPU idle while the host launches its kernels.
Here one training step of each model is captured as a CUDA graph, once for each difficulty of its
task, and replayed on a stream of its own, so that dozens of runs share the device; on a CPU the
same step runs plainly.

A job is plain data (kind, sizes, task, recipe, seed); its result is one JSON record, and a job
whose record exists is not run again.  Sweeps therefore resume, and can be cut into pieces.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bmojo_core.cache import BMojoCache
from bmojo_core.config import BMojoConfig
from bmojo_core.experiments.kept import kept_shares
from bmojo_core.experiments.outside import OUTSIDE
from bmojo_core.experiments.recall_data import RecallPool, answers, make_pool
from bmojo_core.modeling import BMojoForCausalLM
from bmojo_core.training import learning_rate, parameter_groups, provenance, write_json


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes
    ----------
    kind, sizes
        Constructor of `BMojoConfig` and its keyword sizes, or a name in `OUTSIDE` and its own.
    task
        What `make_pool` takes: for MQAR ``seq_len``, ``pairs`` (the mixture trained on),
        ``filler``, ``vocab_size``; ``task`` names another one.
    steps, batch, lr
        Optimiser steps, examples a step, peak learning rate (one for all parameters: these models
        are far below the scale at which the paper's two rates differ).
    seed
        Of the weights and of the order of the examples.
    """

    kind: str
    sizes: dict[str, Any]
    task: dict[str, Any]
    steps: int
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    seed: int = 0
    evaluate_every: int = 0
    stop_at: float = 0.99
    tags: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A readable name, unique to the job's content."""
        content = json.dumps(asdict(self), sort_keys=True).encode()
        label = "-".join(str(v) for v in self.tags.values()) or self.kind
        return f"{label}-{hashlib.sha256(content).hexdigest()[:10]}".replace("/", "_")


def run_jobs(
    jobs: Iterable[Job],
    folder: str | Path,
    *,
    device: str = "cpu",
    together: int = 16,
    seconds: float = float("inf"),
    say: Callable[[str], None] = print,
    weights: str | Path | None = None,
) -> int:
    """Run the jobs without a record in ``folder``, ``together`` at a time; returns how many ran.

    A run that ends is recorded at once and makes place for the next.  None is begun after
    ``seconds``, and those unfinished at one and a half times that are dropped without a record:
    the next call runs them.  Trained models are saved in ``weights``, where it is given, in folders
    with their jobs' names.
    """
    folder, begun, done = Path(folder), time.perf_counter(), 0
    waiting = deque(job for job in jobs if not (folder / f"{job.name}.json").exists())
    pools: dict[str, RecallPool] = {}
    active: list[_Running] = []
    while (age := time.perf_counter() - begun) < 1.5 * seconds:
        while waiting and len(active) < together and age < seconds:
            job = waiting.popleft()
            key = json.dumps(job.task, sort_keys=True)
            if key not in pools:
                pools[key] = make_pool(job.task, device)
            active.append(_Running(job, pools[key], device))
        if not active:
            break
        for run in active:
            run.advance()
        for run in (run for run in active if run.finished):
            if weights is not None:
                run.model.save_pretrained(Path(weights) / run.job.name)
            write_json(folder / f"{run.job.name}.json", run.record())
            say(run.summary())
            done += 1
        active = [run for run in active if not run.finished]
    return done


class _Running:
    """A job in progress: model, optimiser, captured step and evaluations so far."""

    def __init__(self, job: Job, pool: RecallPool, device: str) -> None:
        torch.manual_seed(job.seed)
        self.job, self.pool, self.device = job, pool, torch.device(device)
        self.model = build(job, pool.vocab_size).to(self.device).train()
        self.buffers = pool.buffers(job.batch)
        self.choice = random.Random(job.seed)
        self.generator = torch.Generator(self.device).manual_seed(job.seed)
        self.lr = torch.zeros((), device=self.device)
        groups = parameter_groups(self.model, job.lr, job.lr, job.weight_decay)
        graphed = self.device.type == "cuda"
        for group in groups:
            group["lr"] = self.lr if graphed else 0.0
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.95), fused=graphed or None, capturable=graphed
        )
        self.loss = torch.zeros((), device=self.device)
        self.step, self.finished, self.evaluations, self.losses = 0, False, [], []
        self.begun = time.perf_counter()
        self.stream = torch.cuda.Stream() if graphed else None
        self.replay = self._capture() if graphed else self._plain_step

    def _plain_step(self, difficulty: str) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        read = self.buffers[difficulty]
        logits = answers(self.model, read.ids, read.positions, read.scores)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), read.targets.long().flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _capture(self) -> Callable[[str], None]:
        """The step of every difficulty as a graph, in one pool of memory: one runs at a time.

        Warm-up steps run at rate zero and are then forgotten.
        """
        self.pool.draw(self.buffers, self.choice, self.generator)
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for name in self.pool.names:
                self._plain_step(name)
        self.stream.synchronize()
        graphs, memory = {}, torch.cuda.graph_pool_handle()
        for name in self.pool.names:
            self.optimizer.zero_grad(set_to_none=True)
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name], pool=memory, stream=self.stream):
                self._plain_step(name)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        return lambda name: graphs[name].replay()

    def advance(self) -> None:
        """One step; evaluation and early stop where they are due."""
        self.step += 1
        rate = learning_rate(
            self.step, self.job.steps, self.job.lr, round(self.job.warmup * self.job.steps), 1e-5
        )
        if self.stream is None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.replay(self.pool.draw(self.buffers, self.choice, self.generator))
        else:
            with torch.cuda.stream(self.stream):
                self.lr.fill_(rate)
                self.replay(self.pool.draw(self.buffers, self.choice, self.generator))
        every = self.job.evaluate_every or self.job.steps
        if self.step % every == 0 or self.step == self.job.steps:
            self._evaluate()
        elif self.step % 64 == 0 and self.stream is not None:
            self.stream.synchronize()  # bounds the queue

    def _evaluate(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        self.model.eval()
        accuracy = self.pool.evaluate(self.model)
        loss = float(self.loss)
        entry = {"step": self.step, "loss": loss, "accuracy": accuracy}
        examples = list(self.pool.held_out.values())[-1]
        if selects(self.model) and examples.useful.any():
            entry["kept"] = kept_shares(self.model, examples)
        self.evaluations.append(entry)
        self.model.train()
        solved = min(accuracy.values()) >= self.job.stop_at
        self.finished = solved or loss != loss or self.step >= self.job.steps

    def record(self) -> dict[str, Any]:
        """What the run was and what came of it."""
        return {
            "job": asdict(self.job),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "state_bytes": state_bytes(self.model.config) if ours(self.model) else None,
            "evaluations": self.evaluations,
            "accuracy": self.evaluations[-1]["accuracy"],
            "seconds": round(time.perf_counter() - self.begun, 1),
            **provenance(),
        }

    def summary(self) -> str:
        """One line for the terminal."""
        last = self.evaluations[-1]
        scores = " ".join(f"{n}:{a:.3f}" for n, a in last["accuracy"].items())
        return f"{self.job.name}  step {last['step']}  loss {last['loss']:.3f}  accuracy {scores}"


def build(job: Job, vocab_size: int) -> nn.Module:
    """The job's model with fresh weights."""
    if job.kind in OUTSIDE:
        return OUTSIDE[job.kind](vocab_size=vocab_size, **job.sizes)
    return BMojoForCausalLM(getattr(BMojoConfig, job.kind)(vocab_size=vocab_size, **job.sizes))


def ours(model: nn.Module) -> bool:
    """Whether the model is this library's."""
    return isinstance(model, BMojoForCausalLM)


def selects(model: nn.Module) -> bool:
    """Whether the model has an eidetic memory."""
    return (
        ours(model) and "bmojo" in model.config.layer_types and model.config.num_eidetic_tokens > 0
    )


def state_bytes(config: BMojoConfig, tokens: int = 1) -> int:
    """Bytes that one row carries in float32 after ``tokens`` tokens (grows only for attention)."""
    model = BMojoForCausalLM(config).eval()
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.no_grad():
        cache = BMojoCache()
        model(ids, past_key_values=cache, use_cache=True, memory_scores=torch.zeros(1, tokens))
    return cache.nbytes


def load_records(folder: str | Path) -> list[dict[str, Any]]:
    """All records of a sweep, by name."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
