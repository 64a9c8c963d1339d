"""Perplexity by position: how much a longer past helps, to any length, in constant memory.

    nll_t = -log p(u_t | u_{<t}),      PPL[a, b) = exp( mean of nll_t over a <= t < b )

A text is read in chunks from a carried state, so what is held is one state and one chunk's logits.
(Full ``attention`` sublayers carry everything they have read; the other four kinds do not.)

Symbols: b rows, l tokens a row, c tokens a chunk, v vocabulary, k intervals of positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bmojo_core.cache import BMojoCache
from bmojo_core.modeling import BMojoForCausalLM


@dataclass(frozen=True)
class PositionLoss:
    """Mean losses over intervals of positions.

    Attributes
    ----------
    edges
        Interval i is ``edges[i] <= t < edges[i+1]`` (k + 1,).
    nll
        Mean of -log p over the tokens of each interval, in nats (k,); nan where there are none.
    count
        Tokens of each interval (k,).
    """

    edges: tuple[int, ...]
    nll: Float[Tensor, "k"]
    count: Int[Tensor, "k"]

    @property
    def perplexity(self) -> Float[Tensor, "k"]:
        """exp(nll) of each interval (k,)."""
        return self.nll.exp()


def token_losses(model: BMojoForCausalLM, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """-log p(u_t | u_{<t}) of a sequence that comes in pieces (b, c) of any sizes.

    Yields one tensor (b, c) a piece, aligned with its tokens.  The first token of all has no past
    and gets nan.  The model is read in evaluation mode and left as it was.
    """
    state, ahead, training = BMojoCache(), None, model.training
    model.eval()
    try:
        for ids in pieces:
            ids = ids.to(model.device)
            with torch.no_grad():  # not around the yield: the caller's mode is the caller's
                out = model(ids, past_key_values=state, use_cache=True)
                losses, ahead = _losses(out.logits, ids, ahead)
            yield losses
    finally:
        model.train(training)


def perplexity_by_position(
    model: BMojoForCausalLM,
    documents: Iterable[Tensor],
    edges: Sequence[int],
    chunk: int = 1024,
) -> PositionLoss:
    """Mean losses of documents over intervals of positions.

    Parameters
    ----------
    documents
        Batches of rows (b, l), each read from its beginning; they may have different lengths.
    edges
        Limits of the intervals (k + 1,), increasing, from 0 or later.  Tokens outside are read but
        not counted, and a row's first token, which nothing predicts, is not counted either.
    chunk
        Tokens read at a time; it changes the memory needed, not the result.

    Raises
    ------
    ValueError
        When ``edges`` do not increase, or ``chunk`` is not positive.
    """
    edges = tuple(edges)
    increasing = all(a < b for a, b in pairwise(edges))
    if len(edges) < 2 or edges[0] < 0 or not increasing:
        raise ValueError(f"edges must be two or more increasing positions, got {edges}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    inner = torch.tensor(edges)
    total = torch.zeros(len(edges) + 1, dtype=torch.float64)  # before, the k intervals, after
    count = torch.zeros(len(edges) + 1, dtype=torch.long)
    for ids in documents:
        at = 0
        for losses in token_losses(model, ids.split(chunk, 1)):
            losses = losses.double().cpu()
            place = torch.bucketize(torch.arange(at, at + losses.shape[1]), inner, right=True)
            skip = int(at == 0)  # nothing predicts the first token
            at += losses.shape[1]
            total.index_add_(0, place[skip:], losses[:, skip:].sum(0))
            count.index_add_(0, place[skip:], count.new_full((len(place) - skip,), len(losses)))
    return PositionLoss(edges, (total / count)[1:-1], count[1:-1])


def doubling_edges(length: int, first: int = 128) -> tuple[int, ...]:
    """0, first, 2 first, 4 first, .., length: the intervals of the paper's figure 5.

    Raises
    ------
    ValueError
        When ``length`` or ``first`` is not positive.
    """
    if length < 1 or first < 1:
        raise ValueError(f"length and first must be at least 1, got {length} and {first}")
    edges, limit = [0], first
    while limit < length:
        edges.append(limit)
        limit *= 2
    return (*edges, length)


def _losses(
    logits: Float[Tensor, "b c v"], ids: Int[Tensor, "b c"], ahead: Float[Tensor, "b v"] | None
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b v"]]:
    """Losses of a piece, and the log-probabilities of what comes after it.

    ``ahead`` are those that the piece before left for this one's first token.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(wide).log_softmax(-1)
    told = log_p[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    if ahead is None:
        first = log_p.new_full((len(ids), 1), float("nan"))
    else:
        first = ahead.gather(-1, ids[:, :1])
    return -torch.cat([first, told], 1), log_p[:, -1].clone()
