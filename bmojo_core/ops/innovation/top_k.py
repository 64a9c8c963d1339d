r"""Running top-k as a parallel prefix over a monoid, in plain torch on any device.

Let T(s) be the k largest (score, position) pairs of a stretch s, equal scores resolved for the
older. Then T(a b) = T(T(a) + T(b)) for adjacent stretches a, b: whatever T(a) dropped has k better
rivals inside a already, so it cannot return. "Merge" is therefore associative, its unit is the
empty memory, and the memories before all c chunks are an exclusive prefix "sum" that needs
ceil(log2 c) rounds instead of l steps.

A memory is a triple, its slots ordered by position and filled ones first:

scores (..., k)   score of the token in each slot, -inf in empty slots
index  (..., k)   its position, 0 in empty slots
valid  (..., k)   whether the slot is filled
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Memory = tuple[Float[Tensor, "... k"], Int[Tensor, "... k"], Bool[Tensor, "... k"]]


def top_k(scores: Float[Tensor, "... l"], k: int) -> Memory:
    """The memory of one stretch of tokens: its k largest scores, in order of position.

    Parameters
    ----------
    scores : (..., l)
        -inf and NaN are never stored. l may be 0.
    k : int
        Capacity; slots beyond the storable tokens stay empty.

    Returns
    -------
    scores, index, valid : (..., k) each
        Positions count from the beginning of the stretch.

    Raises
    ------
    ValueError
        k < 0 or scores not floating.
    """
    _check_capacity(k)
    if scores.ndim == 0 or not scores.is_floating_point():
        raise ValueError(f"scores must be (..., l) and floating; got {scores.shape} {scores.dtype}")
    position = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return _keep_largest(scores.detach(), position, scores > -torch.inf, k)


def merge_top_k(
    scores_a: Float[Tensor, "... ka"],
    index_a: Int[Tensor, "... ka"],
    valid_a: Bool[Tensor, "... ka"],
    scores_b: Float[Tensor, "... kb"],
    index_b: Int[Tensor, "... kb"],
    valid_b: Bool[Tensor, "... kb"],
    k: int,
) -> Memory:
    """The memory of stretch a followed by stretch b, from the memories of a and of b.

    With a carried memory as `a` and the memories of new chunks as `b` it continues a running
    selection exactly where it stopped. Associative; ties keep a's token.

    Parameters
    ----------
    scores_a, index_a, valid_a : (..., ka)
        Memory of the older stretch, in order of position. Leading axes broadcast against b's.
    scores_b, index_b, valid_b : (..., kb)
        Memory of the newer stretch. Indices are only carried along: the caller makes them
        absolute (or makes them point into a concatenation of payloads).
    k : int
        Capacity of the result. Equal to the sequential selection when both memories hold the k
        largest of their stretch (or all of it).

    Returns
    -------
    scores, index, valid : (..., k) each
        In order of position (a's slots before b's), filled slots first; -inf, 0, False in the rest.

    Raises
    ------
    ValueError
        k < 0, or the three parts of a memory differ in shape.
    """
    _check_capacity(k)
    for name, s, i, v in (("a", scores_a, index_a, valid_a), ("b", scores_b, index_b, valid_b)):
        if not s.shape == i.shape == v.shape:
            raise ValueError(
                f"scores_{name}, index_{name} and valid_{name} must have one shape; got "
                f"{tuple(s.shape)}, {tuple(i.shape)} and {tuple(v.shape)}"
            )
    leading = torch.broadcast_shapes(scores_a.shape[:-1], scores_b.shape[:-1])
    joined = (
        torch.cat([a.expand(*leading, a.shape[-1]), b.expand(*leading, b.shape[-1])], dim=-1)
        for a, b in ((scores_a, scores_b), (index_a, index_b), (valid_a, valid_b))
    )
    return _keep_largest(*joined, k)


def running_top_k_parallel(
    scores: Float[Tensor, "b l"], k: int, chunk: int
) -> tuple[Int[Tensor, "b c k"], Bool[Tensor, "b c k"]]:
    """Memories before every chunk by a parallel prefix; see ``bmojo_core.ops.innovation``.

    O(c (k + chunk) log) work and O(log c) rounds: after round j each chunk knows the largest of
    the 2^j chunks that end with it.
    """
    b, l = scores.shape
    c = -(-l // chunk)
    chunks = F.pad(scores, (0, c * chunk - l), value=-torch.inf).view(b, c, chunk)
    largest, index, valid = top_k(chunks, min(k, chunk))
    start = torch.arange(0, c * chunk, chunk, device=scores.device)[:, None]
    memory = (largest, torch.where(valid, index + start, 0), valid)
    memory = _shift(memory, 1)  # exclusive: chunk i may see chunks 0 .. i-1 only
    reach = 1
    while reach < c:
        capacity = min(k, 2 * memory[0].shape[-1])
        memory = merge_top_k(*_shift(memory, reach), *memory, capacity)
        reach *= 2
    _, index, valid = (F.pad(part, (0, k - part.shape[-1])) for part in memory)
    return index, valid


def _shift(memory: Memory, by: int) -> Memory:
    """Give every chunk the memory of the chunk `by` places before it; the first ones are empty."""
    shifted = []
    for part, empty in zip(memory, (-torch.inf, 0, False), strict=True):
        shifted.append(F.pad(part[:, :-by], (0, 0, by, 0), value=empty))
    return tuple(shifted)


def _keep_largest(scores: Tensor, index: Tensor, valid: Tensor, k: int) -> Memory:
    """The k largest valid entries of a list ordered by position, in that order."""
    width = scores.shape[-1]
    scores = torch.where(valid, scores, -torch.inf)
    # a stable sort keeps equal scores in their order: the older one stands first
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    best = torch.where(valid.gather(-1, best), best, width)  # empty slots go last
    best = F.pad(best.sort(dim=-1).values, (0, k - best.shape[-1]), value=width)
    kept = best < width
    if width == 0:
        return scores.new_full(best.shape, -torch.inf), torch.zeros_like(best), kept
    slot = torch.where(kept, best, 0)
    return (
        torch.where(kept, scores.gather(-1, slot), -torch.inf),
        torch.where(kept, index.gather(-1, slot), 0),
        kept,
    )


def _check_capacity(k: int) -> None:
    if k < 0:
        raise ValueError(f"k must be >= 0; got {k}")
