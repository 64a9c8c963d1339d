r"""What the memory holds of keys and values, and the gradient of reading it.

    taken[b, n, i] = x[b, index[b, n, i]]
    dx[b, j]       = g[b, j] + sum_{n, i : index[b, n, i] = j, valid} dtaken[b, n, i]

``g`` is the gradient of x's other reader; the sum is added to it in place.  A token that stays in
memory is read by every chunk of a run, so its row has many terms.

x, g (b, l, *r); index, valid (b, n, m); taken, dtaken (b, n, m, *r).
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from bmojo_core.ops.memory_gather.reference import add_taken_reference, take_reference

__all__ = ["add_taken", "take_rows"]


def take_rows(
    x: tuple[Float[Tensor, "b l *r"], ...], index: Int[Tensor, "b n m"]
) -> tuple[Float[Tensor, "b n m *r"], ...]:
    """The rows of every x that each chunk's memory holds."""
    return take_reference(x, index)


def add_taken(
    g: tuple[Float[Tensor, "b l *r"], Float[Tensor, "b l *r"]],
    dtaken: tuple[Float[Tensor, "b n m *r"], Float[Tensor, "b n m *r"]],
    index: Int[Tensor, "b n m"],
    valid: Bool[Tensor, "b n m"],
) -> None:
    """Add to the gradients of keys and of values what their taken rows' gradients are, in place.

    Parameters
    ----------
    g
        Gradients of keys and values, contiguous.
    dtaken
        Gradients of what was taken of each.
    index, valid
        As `running_top_k` gives them: a chunk holds a token once, and a token that has been given
        up does not come back.

    Notes
    -----
    On a GPU one kernel adds up every token's run in the order of the chunks: two runs
    give the same bits. Elsewhere the terms are added by ``index_add_``.
    """
    if g[0].is_cuda:
        from bmojo_core.ops.memory_gather.gpu import add_taken_gpu

        add_taken_gpu(g, dtaken, index, valid)
    else:
        add_taken_reference(g, dtaken, index, valid)
