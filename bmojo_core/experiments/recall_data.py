"""Associative-recall examples kept on the device, in the layout that a captured step reads.

Every batch has one number of pairs, drawn from the mixture; scored columns are given as positions
and targets of fixed size (unused places have target -100), so that shapes never change.

Symbols: N examples of one number of pairs, L sequence length, b batch, q places for queries.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from bmojo_core.modeling import BMojoForCausalLM
from bmojo_core.tasks import mqar

UNSCORED = -100


@dataclass(frozen=True)
class Buffers:
    """What a step reads: ids (b, L), positions and targets (b, q), oracle scores (b, L)."""

    ids: Tensor
    positions: Tensor
    targets: Tensor
    scores: Tensor


class RecallPool:
    """Training and evaluation examples of a mixture of difficulties."""

    def __init__(
        self,
        seq_len: int,
        pairs: list[int],
        filler: str = "zeros",
        vocab_size: int = 8192,
        examples: int = 40_000,
        held_out: int = 512,
        device: str = "cpu",
        evaluate_pairs: list[int] | None = None,
    ) -> None:
        self.seq_len, self.vocab_size, self.pairs = seq_len, vocab_size, list(pairs)
        self.queries = max(pairs)
        make = dict(seq_len=seq_len, vocab_size=vocab_size, filler=filler)
        self.train = {
            n: _compact(*mqar(examples, num_pairs=n, seed=n, **make), self.queries, device)
            for n in self.pairs
        }
        self.held_out = {
            n: _compact(*mqar(held_out, num_pairs=n, seed=10_000 + n, **make), n, device)
            for n in (evaluate_pairs or self.pairs)
        }

    def buffers(self, batch: int) -> Buffers:
        """Static tensors for one step."""
        device = self.train[self.pairs[0]][0].device
        narrow = dict(dtype=torch.int16, device=device)
        shape = (batch, self.queries)
        return Buffers(
            torch.zeros(batch, self.seq_len, **narrow), torch.zeros(shape, **narrow),
            torch.zeros(shape, **narrow), torch.zeros(batch, self.seq_len, device=device),
        )  # fmt: skip

    def draw(self, into: Buffers, choice: random.Random, generator: torch.Generator) -> None:
        """Fill the buffers with a random batch of a random difficulty."""
        n = choice.choice(self.pairs)
        pool = self.train[n]
        b = into.ids.shape[0]
        rows = torch.randint(len(pool[0]), (b,), generator=generator, device=into.ids.device)
        for target, source in zip((into.ids, into.positions, into.targets), pool, strict=True):
            torch.index_select(source, 0, rows, out=target)
        into.scores.copy_(self.oracle(n, b))

    def oracle(self, n: int, batch: int) -> Tensor:
        """What perfect selection would keep: values' positions, where keys are bound to them."""
        column = torch.arange(self.seq_len, device=self.train[self.pairs[0]][0].device)
        wanted = (column < 2 * n) & (column % 2 == 1)
        return wanted.float().expand(batch, -1)

    @torch.no_grad()
    def evaluate(self, model: BMojoForCausalLM, batch: int = 128) -> dict[str, float]:
        """Mean per-example accuracy for each number of pairs."""
        result = {}
        for n, (ids, positions, targets) in self.held_out.items():
            right = 0.0
            parts = zip(ids.split(batch), positions.split(batch), targets.split(batch), strict=True)
            for i, p, t in parts:
                scores = self.oracle(n, len(i))
                hidden = model.model(i.long(), use_cache=False, memory_scores=scores)
                hidden = hidden.last_hidden_state
                at = p.long()[..., None].expand(-1, -1, hidden.shape[-1])
                answer = model.lm_head(hidden.gather(1, at)).argmax(-1)
                right += float((answer == t).double().mean(1).sum())
            result[str(n)] = round(right / len(ids), 4)
        return result


def _compact(
    ids: Tensor, labels: Tensor, places: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, positions, targets) as int16 on the device; unused places are unscored."""
    rows, columns = (labels != UNSCORED).nonzero(as_tuple=True)
    each = len(columns) // len(ids)
    positions = torch.zeros(len(ids), places, dtype=torch.int16)
    targets = torch.full((len(ids), places), UNSCORED, dtype=torch.int16)
    positions[:, :each] = columns.reshape(-1, each).to(torch.int16)
    targets[:, :each] = labels[rows, columns].reshape(-1, each).to(torch.int16)
    return ids.to(torch.int16).to(device), positions.to(device), targets.to(device)
