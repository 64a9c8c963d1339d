"""A training loop to read in one sitting.

    for s in 1..S:   g = grad loss(model, batch(s));   clip |g| <= 1;   AdamW step at lr(s)

A run is a pure function of its arguments: ``batch(s)`` gives the same examples for the same s, so a
run that was interrupted goes on from its last checkpoint to the same numbers.

The loop is the same on one process, on replicas and on shards (``engine``), and on sequences that
are read in chunks (``bptt``).

Labels are aligned: ``labels[:, t]`` is what the output at column t must say, -100 where nothing is
asked.  (transformers shifts labels inside the model; the tasks here need no shift.)
"""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from bmojo_core.batches import IGNORED
from bmojo_core.modeling import BMojoForCausalLM
from bmojo_core.training.bptt import chunks, truncated_backward
from bmojo_core.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    own_part,
    save_checkpoint,
)
from bmojo_core.training.engine import Engine, single
from bmojo_core.training.optim import adamw, set_learning_rates
from bmojo_core.training.record import provenance

Batch = tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the paper's where it gives one.

    Attributes
    ----------
    steps
        S, optimiser steps.
    lr_ssm, lr_attention
        Peak learning rates of the SSM's parameters and of all others.
    warmup
        Share of the steps in which the rate rises.
    floor
        The rate at the end of the cosine.
    accumulate
        Batches whose gradients make one step.
    chunk, horizon
        Read sequences in chunks of so many tokens and truncate gradients after so many chunks
        (appendix B.2); a chunk of 0 reads them whole.
    evaluate_every, stop_at
        Evaluate every so many steps (0: only at the end) and stop early when the evaluation
        returns at least ``stop_at`` under the key ``"accuracy"``.
    checkpoint_every
        Steps between checkpoints (0: none); needs a folder.
    precision
        ``"float32"``, or ``"bfloat16"`` for autocast.
    recompute
        Keep only what enters each block and compute the rest again in backward: less memory, one
        more forward of each block.
    """

    steps: int
    lr_ssm: float = 2e-3
    lr_attention: float = 2e-3
    warmup: float = 0.05
    floor: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    chunk: int = 0
    horizon: int = 1
    evaluate_every: int = 0
    stop_at: float | None = None
    checkpoint_every: int = 0
    precision: str = "float32"
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "accumulate": 1, "horizon": 1, "chunk": 0, "checkpoint_every": 0}
        least |= {"evaluate_every": 0, "seed": -math.inf}
        for name, bound in least.items():
            value = getattr(self, name)
            if not _is_number(value, numbers.Integral):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if value < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}")
        for name in ("lr_ssm", "lr_attention", "clip"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        for name in ("floor", "weight_decay"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")
        if not (_is_number(self.warmup) and 0 <= self.warmup < 1):
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup!r}")
        if self.stop_at is not None and not _is_number(self.stop_at):
            raise ValueError(f"stop_at must be a number or None, got {self.stop_at!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")


def _is_number(value: object, kind: type = numbers.Real) -> bool:
    """Whether a value is a number of a kind, NumPy's included; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class Run:
    """What a training run did: losses and evaluations by step, and where it ran."""

    losses: list[float]
    evaluations: list[dict[str, Any]]
    seconds: float
    record: dict[str, Any] = field(default_factory=dict)


def scored_loss(
    model: BMojoForCausalLM, input_ids: Int[Tensor, "b l"], labels: Int[Tensor, "b l"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the scored columns; logits are computed for those alone."""
    logits, target = scored_logits(model, input_ids, labels)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), target)


def scored_logits(
    model: BMojoForCausalLM, input_ids: Int[Tensor, "b l"], labels: Int[Tensor, "b l"]
) -> tuple[Float[Tensor, "s v"], Int[Tensor, "s"]]:
    """Logits (s, v) and targets (s,) of the s scored columns, row by row."""
    hidden = model.model(input_ids, use_cache=False).last_hidden_state
    asked = labels != IGNORED
    return model.lm_head(hidden[asked]), labels[asked]


def train(
    model: BMojoForCausalLM,
    batch: Callable[[int], Batch],
    recipe: Recipe,
    *,
    evaluate: Callable[[BMojoForCausalLM], dict[str, Any]] | None = None,
    loss: Callable[[BMojoForCausalLM, Tensor, Tensor], Tensor] = scored_loss,
    folder: str | Path | None = None,
    keep: int = 1,
    name: str = "training",
    progress: bool = True,
    engine: Engine | None = None,
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Train in place; resume from ``folder`` when it holds a checkpoint.

    Parameters
    ----------
    batch
        Function that returns the examples (input_ids, labels) of step s (counted from 1 over all
        batches, accumulated ones included).  Every rank is given all and takes its own rows.
    evaluate
        Metrics of the model, on data of its own; every rank computes them.
    loss
        Mean over the scored columns.
    folder, keep
        Where checkpoints go, and how many of the newest stay; nothing is written without a folder.
    name
        Shown by the progress bar.
    engine
        Where to train; None: in this process.
    stop
        Asked after every step: whether to save and raise ``KeyboardInterrupt`` (``interruption``).

    Raises
    ------
    FloatingPointError
        When the loss is not finite: says the step and the largest gradient before it.
    ValueError
        When the folder's checkpoint is damaged or belongs to another recipe; when ``batch`` is no
        function or returns what is no pair of tensors, or, for ``scored_loss``, labels of another
        shape than the ids or nothing but -100; when the recipe asks for what is not given.
    OSError
        When a checkpoint cannot be written; those already there are untouched.
    """
    if not callable(batch):
        raise ValueError(
            "batch must be a function of the step that returns (input_ids, labels), got "
            f"{type(batch).__name__}"
        )
    if recipe.checkpoint_every and folder is None:
        raise ValueError("checkpoint_every needs a folder")
    if recipe.chunk and loss is not scored_loss:
        raise ValueError("chunk needs the loss to be scored_loss, whose parts add up")
    torch.manual_seed(recipe.seed)
    engine = engine or single(model)
    if recipe.recompute:
        newer = getattr(model, "activation_checkpointing_enable", None)  # where the other warns
        (newer or model.gradient_checkpointing_enable)()
    optimizer = adamw(engine.model, recipe.lr_ssm, recipe.lr_attention, recipe.weight_decay)
    begun = time.perf_counter()
    first, losses, evaluations = _resume(folder, engine.model, optimizer, recipe)

    def save(step: int) -> None:
        run = {"recipe": asdict(recipe), "losses": losses, "evaluations": evaluations}
        save_checkpoint(folder, step, engine.model, optimizer, run, keep, write=engine.is_main)
        engine.wait()

    warmup = round(recipe.warmup * recipe.steps)
    bar = tqdm(desc=name, disable=not (progress and engine.is_main), initial=first - 1,
               total=recipe.steps, mininterval=0.5)  # fmt: skip
    model.train()
    for step in range(first, recipe.steps + 1):
        set_learning_rates(optimizer, step, recipe.steps, warmup, recipe.floor)
        losses.append(_step(engine, optimizer, batch, loss, recipe, step))
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
        last = step == recipe.steps
        due = recipe.evaluate_every and step % recipe.evaluate_every == 0
        if evaluate is not None and (due or last):
            evaluations.append({"step": step, **_evaluated(engine, evaluate)})
            bar.set_postfix_str(_brief(losses[-1], evaluations[-1]), refresh=False)
            accuracy = evaluations[-1].get("accuracy", -math.inf)
            last = last or (recipe.stop_at is not None and accuracy >= recipe.stop_at)
        asked = stop is not None and engine.any(stop())
        every = recipe.checkpoint_every
        if folder is not None and (asked or (every and (last or step % every == 0))):
            save(step)
        bar.update()
        if asked and not last:
            bar.close()
            raise KeyboardInterrupt(f"stopped after step {step} of {recipe.steps}")
        if last:
            break
    bar.close()
    model.eval()
    seconds = time.perf_counter() - begun
    record = {"recipe": asdict(recipe), "model": model.config.to_diff_dict(), **provenance()}
    return Run(losses, evaluations, seconds, record)


def _step(engine: Engine, optimizer, batch, loss, recipe: Recipe, step: int) -> float:
    """One optimiser step; the mean loss of its batches."""
    total, readings = 0.0, 0
    for part in range(recipe.accumulate):
        number = (step - 1) * recipe.accumulate + part + 1
        share = engine.share(*_checked(batch(number), number, aligned=loss is scored_loss))
        weight, last = share.weight / recipe.accumulate, part == recipe.accumulate - 1
        zero = (lambda: optimizer.zero_grad(set_to_none=True)) if part == 0 else (lambda: None)
        readings += -(-share.input_ids.shape[1] // recipe.chunk) if recipe.chunk else 1
        backward = _backward_by_chunks if recipe.chunk else _backward
        try:
            total += weight * backward(engine, share, weight, loss, recipe, zero, last)
        except FloatingPointError as error:
            raise FloatingPointError(_diverged(engine.model, step, str(error))) from None
    _average_own_losses(engine.model, readings)
    torch.nn.utils.clip_grad_norm_(engine.model.parameters(), recipe.clip)
    optimizer.step()
    return engine.mean(total)


def _checked(given: Any, number: int, aligned: bool) -> Batch:
    """What ``batch(number)`` gave, if it can be trained on.

    Only where labels are ``aligned`` with the columns does their shape say anything, and does a
    batch of -100 teach nothing (its mean loss is 0 / 0): a loss of the caller's own may read them
    otherwise.
    """
    pair = tuple(given) if isinstance(given, Iterable) else ()
    if len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
        held = [type(x).__name__ for x in pair[:3]] + [".."] * (len(pair) > 3)
        what = type(given).__name__ + (f" of {', '.join(held)}" if held else "")
        raise ValueError(
            f"batch({number}) must be a pair of tensors (input_ids, labels), got {what}"
        )
    input_ids, labels = pair
    if aligned and labels.shape != input_ids.shape:
        raise ValueError(
            f"labels of batch({number}) must have the shape of its input_ids, "
            f"{tuple(input_ids.shape)}, got {tuple(labels.shape)}"
        )
    if aligned and not bool((labels != IGNORED).any()):
        raise ValueError(
            f"labels of batch({number}) must score at least one column, got only {IGNORED}"
        )
    return input_ids, labels


def _average_own_losses(model: torch.nn.Module, readings: int) -> None:
    """The learned predictor's gradient: the mean over readings of what each has added.

    Its loss descends by itself, once a reading and whatever the weight of the task's loss
    (``selection.also_minimise``); as the mean of several it is that of one batch.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".predictor") and parameter.grad is not None:
            parameter.grad /= readings


def _backward(engine: Engine, share, weight: float, loss, recipe, zero, last: bool) -> float:
    """Gradients of a batch read whole, added up over ranks after its ``last`` part."""
    engine.add_up(last)
    value = _autocast(engine, recipe)(loss, share.input_ids, share.labels)
    number = float(value.detach())
    if not math.isfinite(number):
        raise FloatingPointError(f"the loss is {number}")
    zero()
    (value * weight).backward()
    return number


def _backward_by_chunks(
    engine: Engine, share, weight: float, loss, recipe, zero, last: bool
) -> float:
    """The same for a batch read in chunks."""
    engine.add_up(False)
    return truncated_backward(
        engine.model, chunks(share.input_ids, share.labels, recipe.chunk), share.scored,
        horizon=recipe.horizon, weight=weight, call=_autocast(engine, recipe),
        before_first=zero, before_last=lambda: engine.add_up(last),
    )  # fmt: skip


def _autocast(engine: Engine, recipe: Recipe) -> Callable[..., Any]:
    """engine.call in the precision of the recipe."""

    def call(function, *arguments):
        half = recipe.precision == "bfloat16"
        with torch.autocast(engine.model.device.type, torch.bfloat16, enabled=half):
            return engine.call(function, *arguments)

    return call


def _diverged(model: torch.nn.Module, step: int, what: str) -> str:
    largest = {
        n: float(own_part(p.grad).abs().max())
        for n, p in model.named_parameters()
        if p.grad is not None and own_part(p.grad).numel()
    }
    message = f"{what} at step {step}"
    if not largest:
        return f"{message}, before any gradient: look at the initial weights and the first batch"
    name = max(largest, key=largest.get)
    return f"{message}; the largest gradient before it is {largest[name]:.3g}, of {name}"


def _evaluated(engine: Engine, evaluate) -> dict[str, Any]:
    engine.model.eval()
    with torch.no_grad():
        metrics = engine.call(evaluate)
    engine.model.train()
    return metrics


def _brief(loss: float, evaluation: dict[str, Any]) -> str:
    accuracy = evaluation.get("accuracy")
    return f"loss {loss:.3f}" + ("" if accuracy is None else f", accuracy {accuracy:.3f}")


def _resume(folder, model, optimizer, recipe: Recipe) -> tuple[int, list, list]:
    """First step to do, with the losses and evaluations so far."""
    found = checkpoints(folder) if folder is not None else []
    if not found:
        return 1, [], []
    try:
        run = load_checkpoint(found[-1], model, optimizer)
    except ValueError as error:
        if len(found) == 1:
            raise
        raise ValueError(f"{error}; remove it to go on from {found[-2].name}") from error
    if run["recipe"] != asdict(recipe):
        raise ValueError(f"checkpoint {found[-1]} belongs to another recipe: {run['recipe']}")
    return run["step"] + 1, run["losses"], run["evaluations"]
