"""Examples of the recall tasks kept on the device, in the layout that a captured step reads.

A pool has one training set for each difficulty; every batch is drawn from one of them.  Scored
columns are given as positions and targets of one size for each difficulty (unused places have
target -100), so that its shapes never change.  Held-out sets may be longer than the training sets.

Symbols: N examples of one difficulty, L sequence length, b batch, q places for answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bmojo_core.batches import IGNORED
from bmojo_core.modeling import BMojoForCausalLM
from bmojo_core.tasks import fuzzy_recall, induction_heads, mqar, noisy_recall, selective_copying

HELD_OUT_SEED = 10_000
TASKS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "selective_copying": selective_copying,
    "induction_heads": induction_heads,
    "noisy_recall": noisy_recall,
    "fuzzy_recall": fuzzy_recall,
}


@dataclass(frozen=True)
class Buffers:
    """What a step reads: ids (b, L), positions and targets (b, q), oracle scores (b, L)."""

    ids: Int[Tensor, "b L"]
    positions: Int[Tensor, "b q"]
    targets: Int[Tensor, "b q"]
    scores: Float[Tensor, "b L"]


@dataclass(frozen=True)
class Examples:
    """Examples of one difficulty; ``useful`` (L,) is 1 where perfect selection would keep a token.

    It serves the oracle and the share of useful tokens kept; all zeros where a task has no fixed
    columns of that kind.
    """

    ids: Int[Tensor, "N L"]
    positions: Int[Tensor, "N q"]
    targets: Int[Tensor, "N q"]
    useful: Float[Tensor, "L"]

    def to(self, device: str) -> Examples:
        """On a device."""
        parts = (self.ids, self.positions, self.targets, self.useful)
        return Examples(*(x.to(device) for x in parts))


class RecallPool:
    """Training and held-out examples by difficulty.

    Parameters
    ----------
    train, held_out
        Examples by the name of their difficulty; all training sets have one length.
    vocab_size
        Tokens of the task.
    device
        Where the examples are kept.
    """

    def __init__(
        self, train: dict[str, Examples], held_out: dict[str, Examples], vocab_size: int,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.vocab_size, self.names = vocab_size, list(train)
        self.train = {name: e.to(device) for name, e in train.items()}
        self.held_out = {name: e.to(device) for name, e in held_out.items()}

    def buffers(self, batch: int) -> dict[str, Buffers]:
        """Static tensors for one step of each difficulty."""
        return {
            name: Buffers(
                *(x.new_zeros(batch, x.shape[1]) for x in (e.ids, e.positions, e.targets)),
                e.useful.expand(batch, -1).clone(),
            )
            for name, e in self.train.items()
        }

    def draw(
        self, into: dict[str, Buffers], choice: random.Random, generator: torch.Generator
    ) -> str:
        """Fill the buffers of a random difficulty with a random batch of it; returns its name."""
        name = choice.choice(self.names)
        source, filled = self.train[name], into[name]
        device, batch = source.ids.device, len(filled.ids)
        rows = torch.randint(len(source.ids), (batch,), generator=generator, device=device)
        for field in ("ids", "positions", "targets"):
            torch.index_select(getattr(source, field), 0, rows, out=getattr(filled, field))
        return name

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, tokens: int = 1 << 15) -> dict[str, float]:
        """Mean per-example accuracy of every held-out set, ``tokens`` at a time."""
        return {name: round(_accuracy(model, e, tokens), 4) for name, e in self.held_out.items()}


def make_pool(task: dict[str, Any], device: str = "cpu") -> RecallPool:
    """The pool that a job's ``task`` describes: MQAR, unless it names another one of `TASKS`."""
    return task_pool(**task, device=device) if "task" in task else mqar_pool(**task, device=device)


def mqar_pool(
    seq_len: int,
    pairs: list[int],
    filler: str = "zeros",
    vocab_size: int = 8192,
    examples: int = 40_000,
    held_out: int = 512,
    device: str = "cpu",
    evaluate_pairs: list[int] | None = None,
    evaluate_lengths: list[int] | None = None,
) -> RecallPool:
    """A mixture of numbers of pairs; the useful tokens are the values of the pairs.

    ``evaluate_lengths`` adds held-out sets of other lengths, named ``pairs@length``.
    """

    def make(n: int, count: int, seed: int, length: int) -> Examples:
        useful = torch.zeros(length)
        useful[1 : 2 * n : 2] = 1.0  # where a key is bound to its value
        made = mqar(count, length, n, vocab_size=vocab_size, filler=filler, seed=seed)
        return compact(*made, useful)

    scored = evaluate_pairs or pairs
    held = {str(n): make(n, held_out, HELD_OUT_SEED + n, seq_len) for n in scored}
    for length in evaluate_lengths or ():
        held |= {f"{n}@{length}": make(n, held_out, HELD_OUT_SEED + n, length) for n in scored}
    return RecallPool({str(n): make(n, examples, n, seq_len) for n in pairs}, held, vocab_size,
                      device)  # fmt: skip


def task_pool(
    task: str,
    seq_len: int,
    vocab_size: int,
    examples: int = 40_000,
    held_out: int = 512,
    device: str = "cpu",
    evaluate_lengths: list[int] | None = None,
    **options: Any,
) -> RecallPool:
    """One of `TASKS` at one difficulty, named after the length.

    ``options`` go to the generator, which checks them.

    Raises
    ------
    ValueError
        When the task is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {task!r}")

    def make(count: int, seed: int, length: int) -> Examples:
        made = TASKS[task](count, length, vocab_size=vocab_size, seed=seed, **options)
        return compact(*made, torch.zeros(length))

    lengths = [seq_len, *(evaluate_lengths or ())]
    held = {str(n): make(held_out, HELD_OUT_SEED, n) for n in lengths}
    return RecallPool({str(seq_len): make(examples, 0, seq_len)}, held, vocab_size, device)


def compact(ids: Tensor, labels: Tensor, useful: Tensor) -> Examples:
    """Examples in int16, their scored columns in order; rows with fewer have unscored places."""
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    count = torch.bincount(rows, minlength=len(ids))
    place = torch.arange(len(rows)) - (count.cumsum(0) - count)[rows]
    shape = (len(ids), int(count.max()))
    positions = torch.zeros(shape, dtype=torch.int16)
    targets = torch.full(shape, IGNORED, dtype=torch.int16)
    positions[rows, place] = columns.to(torch.int16)
    targets[rows, place] = labels[rows, columns].to(torch.int16)
    return Examples(ids.to(torch.int16), positions, targets, useful)


def answers(
    model: torch.nn.Module, ids: Tensor, positions: Tensor, scores: Tensor
) -> Float[Tensor, "b q v"]:
    """Logits where answers are due: the head is applied there only."""
    if isinstance(model, BMojoForCausalLM):
        out = model.model(ids.long(), use_cache=False, memory_scores=scores)
    else:  # one of transformers' own: it names its stack itself and knows no scores
        out = model.base_model(input_ids=ids.long(), use_cache=False)
    hidden = out.last_hidden_state
    at = positions.long()[..., None].expand(-1, -1, hidden.shape[-1])
    return model.lm_head(hidden.gather(1, at))


def _accuracy(model: torch.nn.Module, examples: Examples, tokens: int) -> float:
    right, batch = 0.0, max(1, tokens // examples.ids.shape[1])
    parts = (x.split(batch) for x in (examples.ids, examples.positions, examples.targets))
    for ids, positions, targets in zip(*parts, strict=True):
        said = answers(model, ids, positions, examples.useful.expand(len(ids), -1)).argmax(-1)
        asked = targets != IGNORED
        right += float((((said == targets) & asked).sum(1) / asked.sum(1).double()).sum())
    return right / len(examples.ids)
