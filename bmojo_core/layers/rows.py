"""Rows of tokens of unequal length, and how they meet a grid of chunks.

Inside the model row i holds its valid tokens in columns 0 .. n_i - 1 (n = ``lengths``; None means
that all columns are valid).  Chunks of c tokens are counted from the beginning of each row's
sequence, so a row that has already read t tokens starts at phase t mod c inside a chunk; `align`
moves it there:

    row      [ u_t  u_{t+1} ... ]               phase f = t mod c
    aligned  [ -  -  u_t | u_{t+1} ... | ... ]  f empty columns, then whole chunks

Symbols: b batch, l columns, ... any trailing shape.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from bmojo_core.ops.memory_gather.reference import rows_of


def is_valid(lengths: Int[Tensor, "b"], columns: int) -> Bool[Tensor, "b l"]:
    """Which of the columns hold a token: (b, columns)."""
    return torch.arange(columns, device=lengths.device) < lengths[:, None]


def take(x: Shaped[Tensor, "b l *r"], index: Int[Tensor, "b *i"]) -> Shaped[Tensor, "b *i *r"]:
    """x[i, index[i, ...]] for every row i.

    Written as a selection from the flattened rows: its gradient is an ``index_add``, which is many
    times faster on a CPU than the one of advanced indexing.
    """
    return take_places(x, places(index, x.shape[1]), index.shape)


def places(index: Int[Tensor, "b *i"], columns: int) -> Int[Tensor, "s"]:
    """Where (i, index[i, ...]) is among the flattened rows of so many columns, in order."""
    return rows_of(index, columns)


def take_places(
    x: Shaped[Tensor, "b l *r"], place: Int[Tensor, "s"], shape: tuple[int, ...]
) -> Shaped[Tensor, "b *i *r"]:
    """`take` with its `places` known, for several x that are read at the same ones."""
    return x.flatten(0, 1).index_select(0, place).reshape(*shape, *x.shape[2:])


def slide(
    old: Shaped[Tensor, "b c *r"], new: Shaped[Tensor, "b l *r"], lengths: Int[Tensor, "b"] | None
) -> Shaped[Tensor, "b c *r"]:
    """The last c valid columns of [old | new], where ``lengths`` counts the new ones.

    Never a view: a state must not keep alive the long tensor that it was cut from.
    """
    c, l = old.shape[1], new.shape[1]
    if c == 0:
        return old
    if lengths is not None:
        index = lengths[:, None] + torch.arange(c, device=new.device)
        return take(torch.cat([old, new], 1), index)
    if l >= c:
        return new[:, l - c :].clone()
    return torch.cat([old[:, l:], new], 1)


def align(
    x: Shaped[Tensor, "b l *r"], phase: Int[Tensor, "b"], columns: int, fill: float = 0
) -> Shaped[Tensor, "b n *r"]:
    """Row i moved ``phase[i]`` columns to the right, in a grid filled with ``fill``."""
    source = torch.arange(columns, device=x.device) - phase[:, None]
    inside = (source >= 0) & (source < x.shape[1])
    moved = take(x, source.clamp(0, x.shape[1] - 1))
    return moved.masked_fill(~inside.reshape(*inside.shape, *[1] * (x.ndim - 2)), fill)


def unalign(
    x: Shaped[Tensor, "b n *r"], phase: Int[Tensor, "b"], columns: int
) -> Shaped[Tensor, "b l *r"]:
    """The inverse of `align`: the ``columns`` that begin at each row's phase."""
    return take(x, phase[:, None] + torch.arange(columns, device=x.device))


class Known(NamedTuple):
    """What the host knows of the rows before a step, without asking the device."""

    chunk_begins: bool  # the next token of some row is the first of a chunk
    window_full: bool  # every row has read enough to fill the window of its next token
    memory_full: bool  # no place of the memory in use is empty


class _Here(threading.local):
    """What this thread was told: another one, with rows of its own, must not believe it.

    Unlike a ContextVar's, the value can be read by a step that is being traced, and the traced
    step is used again only where the value is the same.
    """

    known: Known | None = None


_here = _Here()


@contextmanager
def known(what: Known | None) -> Iterator[None]:
    """Let a step on an accelerator do what its rows need and no more, as one on a CPU does.

    For the steps of this thread; those of others go on asking nothing and knowing nothing.
    """
    before, _here.known = _here.known, what
    try:
        yield
    finally:
        _here.known = before


def told() -> Known | None:
    """What `known` has told this thread."""
    return _here.known


def _answers(x: Tensor) -> bool:
    """Whether a question to this tensor is cheap: an accelerator, or a graph being traced, would
    make everything wait."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def may_hold(condition: Bool[Tensor, "*b"]) -> bool:
    """Whether work that only some rows need is worth doing: asked where the answer is cheap."""
    return not _answers(condition) or bool(condition.any())


def may_lack(valid: Bool[Tensor, "b m"]) -> bool:
    """Whether a place of the memory in use may be empty."""
    if _answers(valid):
        return not bool(valid.all())
    return _here.known is None or not _here.known.memory_full


def may_begin_chunk(read: Int[Tensor, "b"], length: int) -> bool:
    """Whether the next token may be the first of a chunk in some row."""
    if _answers(read):
        return any(r % length == 0 for r in read.tolist())
    return _here.known is None or _here.known.chunk_begins


def may_lack_window(read: Int[Tensor, "b"], w: int) -> bool:
    """Whether the window of the next token may reach before the beginning of some row."""
    if _answers(read):
        return any(r < w - 1 for r in read.tolist())
    return _here.known is None or not _here.known.window_full
