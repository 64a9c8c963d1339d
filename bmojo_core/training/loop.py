"""A training loop to read in one sitting.

    for s in 1..S:   g = grad loss(model, batch(s));   clip |g| <= 1;   AdamW step at lr(s)

A run is a pure function of its arguments: ``batch(s)`` gives the same examples for the same s, so a
run that was interrupted goes on from its last checkpoint to the same numbers.

Labels are aligned: ``labels[:, t]`` is what the output at column t must say, -100 where nothing is
asked.  (transformers shifts labels inside the model; the tasks here need no shift.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from bmojo_core.modeling import BMojoForCausalLM
from bmojo_core.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from bmojo_core.training.optim import adamw, set_learning_rates
from bmojo_core.training.record import provenance

Batch = tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]
UNSCORED = -100


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
    evaluate_every, stop_at
        Evaluate every so many steps (0: only at the end) and stop early when the evaluation
        returns at least ``stop_at`` under the key ``"accuracy"``.
    checkpoint_every
        Steps between checkpoints (0: none); needs a folder.
    precision
        ``"float32"``, or ``"bfloat16"`` for autocast.
    """

    steps: int
    lr_ssm: float = 2e-3
    lr_attention: float = 2e-3
    warmup: float = 0.05
    floor: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    evaluate_every: int = 0
    stop_at: float | None = None
    checkpoint_every: int = 0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr_ssm", "lr_attention", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")


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
    return F.cross_entropy(logits.float(), target)


def scored_logits(
    model: BMojoForCausalLM, input_ids: Int[Tensor, "b l"], labels: Int[Tensor, "b l"]
) -> tuple[Float[Tensor, "s v"], Int[Tensor, "s"]]:
    """Logits (s, v) and targets (s,) of the s scored columns, row by row."""
    hidden = model.model(input_ids, use_cache=False).last_hidden_state
    asked = labels != UNSCORED
    return model.lm_head(hidden[asked]), labels[asked]


def train(
    model: BMojoForCausalLM,
    batch: Callable[[int], Batch],
    recipe: Recipe,
    *,
    evaluate: Callable[[BMojoForCausalLM], dict[str, Any]] | None = None,
    loss: Callable[[BMojoForCausalLM, Tensor, Tensor], Tensor] = scored_loss,
    folder: str | Path | None = None,
    name: str = "training",
    progress: bool = True,
) -> Run:
    """Train in place; resume from ``folder`` when it holds a checkpoint.

    Parameters
    ----------
    batch
        Examples of step s (counted from 1 over all batches, accumulated ones included).
    evaluate
        Metrics of the model, on data of its own.
    folder
        Where checkpoints go; nothing is written without one.
    name
        Shown by the progress bar.

    Raises
    ------
    FloatingPointError
        When the loss is not finite: says the step and the largest gradient of the step before.
    ValueError
        When the folder's checkpoint is damaged or belongs to another recipe.
    """
    if recipe.checkpoint_every and folder is None:
        raise ValueError("checkpoint_every needs a folder")
    torch.manual_seed(recipe.seed)
    optimizer = adamw(model, recipe.lr_ssm, recipe.lr_attention, recipe.weight_decay)
    begun = time.perf_counter()
    first, losses, evaluations = _resume(folder, model, optimizer, recipe)
    warmup = round(recipe.warmup * recipe.steps)
    bar = tqdm(range(first, recipe.steps + 1), desc=name, disable=not progress, leave=True,
               initial=first - 1, total=recipe.steps, mininterval=0.5)  # fmt: skip
    model.train()
    for step in bar:
        set_learning_rates(optimizer, step, recipe.steps, warmup, recipe.floor)
        losses.append(_step(model, optimizer, batch, loss, recipe, step))
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
        last = step == recipe.steps
        due = recipe.evaluate_every and step % recipe.evaluate_every == 0
        if evaluate is not None and (due or last):
            evaluations.append({"step": step, **_evaluated(model, evaluate)})
            bar.set_postfix_str(_brief(losses[-1], evaluations[-1]), refresh=False)
            accuracy = evaluations[-1].get("accuracy", -math.inf)
            last = last or (recipe.stop_at is not None and accuracy >= recipe.stop_at)
        if recipe.checkpoint_every and (last or step % recipe.checkpoint_every == 0):
            run = {"recipe": asdict(recipe), "losses": losses, "evaluations": evaluations}
            save_checkpoint(folder, step, model, optimizer, run)
        if last:
            break
    bar.close()
    model.eval()
    seconds = time.perf_counter() - begun
    record = {"recipe": asdict(recipe), "model": model.config.to_diff_dict(), **provenance()}
    return Run(losses, evaluations, seconds, record)


def _step(model, optimizer, batch, loss, recipe: Recipe, step: int) -> float:
    """One optimiser step; the mean loss of its batches."""
    device = next(model.parameters()).device
    total = 0.0
    for part in range(recipe.accumulate):
        ids, labels = batch((step - 1) * recipe.accumulate + part + 1)
        ids, labels = ids.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            value = loss(model, ids, labels)
        number = float(value.detach())
        if not math.isfinite(number):
            raise FloatingPointError(_diverged(model, step, number))
        if part == 0:
            optimizer.zero_grad(set_to_none=True)
        (value / recipe.accumulate).backward()
        total += number / recipe.accumulate
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return total


def _diverged(model: torch.nn.Module, step: int, value: float) -> str:
    largest = {
        n: float(p.grad.abs().max()) for n, p in model.named_parameters() if p.grad is not None
    }
    message = f"the loss is {value} at step {step}"
    if not largest:
        return f"{message}, before any gradient: look at the initial weights and the first batch"
    name = max(largest, key=largest.get)
    return f"{message}; the largest gradient of the step before is {largest[name]:.3g}, of {name}"


def _evaluated(model, evaluate) -> dict[str, Any]:
    model.eval()
    with torch.no_grad():
        metrics = evaluate(model)
    model.train()
    return metrics


def _brief(loss: float, evaluation: dict[str, Any]) -> str:
    accuracy = evaluation.get("accuracy")
    return f"loss {loss:.3f}" + ("" if accuracy is None else f", accuracy {accuracy:.3f}")


def _resume(folder, model, optimizer, recipe: Recipe) -> tuple[int, list, list]:
    """First step to do, with the losses and evaluations so far."""
    found = checkpoints(folder) if folder is not None else []
    if not found:
        return 1, [], []
    run = load_checkpoint(found[-1], model, optimizer)
    if run["recipe"] != asdict(recipe):
        raise ValueError(f"checkpoint {found[-1]} belongs to another recipe: {run['recipe']}")
    return run["step"] + 1, run["losses"], run["evaluations"]
