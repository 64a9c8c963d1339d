"""Truncated backpropagation through time: sequences of any length in constant memory.

A sequence is read in chunks u_1 .. u_C from a carried state (appendix B.2),

    (S_c, L_c) = f(S_{c-1}, u_c),          L = (1/n) sum_c L_c

The state S (fading and eidetic memory, window) goes on for ever; the gradient goes back through
``horizon`` chunks.  With H = h, 2h, .. the chunks at whose end the state is detached,

    g = (1/n) sum_H  d/dtheta  sum_{H-h < c <= H} L_c,     S_{H-h} held constant

A horizon of all C chunks truncates nothing: g is then the full gradient.  Otherwise what is alive
at any time is the graph of ``horizon`` chunks and one state, whatever C is.  (Full ``attention``
sublayers have a state that grows with what they have read; the other four kinds do not.)

Symbols
-------
b, l, c    batch, length of the sequence, tokens a chunk
n          scored tokens of the whole sequence
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bmojo_core.batches import IGNORED
from bmojo_core.cache import BMojoCache
from bmojo_core.modeling import BMojoForCausalLM

Batch = tuple[Tensor, Tensor]  # input_ids and labels (b, c)
Call = Callable[..., Any]  # call(f, *arguments) = f(model, *arguments)


def chunks(
    input_ids: Int[Tensor, "b l"], labels: Int[Tensor, "b l"], chunk: int
) -> Iterator[Batch]:
    """The sequence in pieces of ``chunk`` columns; the last one may be shorter.

    Raises
    ------
    ValueError
        When ``chunk`` is not positive, or the two have different shapes.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if input_ids.shape != labels.shape:
        shapes = f"{tuple(input_ids.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"input_ids and labels must have one shape, got {shapes}")
    return zip(input_ids.split(chunk, 1), labels.split(chunk, 1), strict=True)


def read_on(
    model: BMojoForCausalLM,
    input_ids: Int[Tensor, "b c"],
    labels: Int[Tensor, "b c"],
    state: BMojoCache | None,
) -> tuple[Float[Tensor, ""], BMojoCache]:
    """L_c and S_c: the summed cross-entropy of a chunk's scored columns, and the state after it.

    ``labels[:, t]`` is what the output at column t must say (as in ``training.loop``), so a
    chunk's end needs no look at the next chunk.  ``state`` is updated in place.
    """
    state = BMojoCache() if state is None else state
    out = model.model(input_ids, past_key_values=state, use_cache=True)
    asked = labels != IGNORED
    logits = model.lm_head(out.last_hidden_state[asked])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels[asked], reduction="sum"), state


def truncated_backward(
    model: BMojoForCausalLM,
    pieces: Iterable[Batch],
    scored: int,
    *,
    horizon: int | None = 1,
    weight: float = 1.0,
    call: Call | None = None,
    before_first: Callable[[], None] | None = None,
    before_last: Callable[[], None] | None = None,
) -> float:
    """Add ``weight`` times the truncated gradient g to every ``.grad``; return the mean loss L.

    A loss of the model's own (``selection.also_minimise``) is added once a chunk, without weight.

    Parameters
    ----------
    model
        In training or evaluation mode; it is read chunk by chunk from the empty state.
    pieces
        (input_ids, labels) of the chunks, in order, all of the same b rows.  They may come from a
        generator: one is held at a time, so even the tokens need not fit in memory.
    scored
        n, the number of labels in all pieces that are not -100.
    horizon
        h, chunks that a gradient goes back through; None for all of them.
    call
        How to run a function of the model, ``call(f, *arguments)``; an engine that wraps the model
        gives its own (``training.engine``).
    before_first
        Called when the losses of the first group are known and finite, before its gradients are
        added: where those of an earlier step are cleared.
    before_last
        Called before the last group is read: where replicas begin to add up their gradients.

    Raises
    ------
    ValueError
        When ``horizon`` or ``scored`` is not positive or ``pieces`` is empty.
    FloatingPointError
        When the loss of a chunk is not finite; gradients of the chunks before stay.
    """
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon must be at least 1 or None, got {horizon}")
    if scored < 1:
        raise ValueError(f"scored must be at least 1, got {scored}: nothing to learn from")
    call = call or (lambda function, *arguments: function(model, *arguments))
    state, total, read = None, None, 0
    for group, last in _groups(pieces, horizon):
        if last and before_last is not None:
            before_last()
        loss: Tensor | float = 0.0
        for input_ids, labels in group:
            read += 1
            part, state = call(read_on, input_ids, labels, state)
            if not bool(torch.isfinite(part.detach())):
                raise FloatingPointError(f"the loss of chunk {read} is {float(part.detach())}")
            loss = loss + part
        if total is None and before_first is not None:
            before_first()
        (loss * (weight / scored)).backward()
        total = (total or 0.0) + float(loss.detach())
        del loss, part
        state = state.detach()
    if read == 0:
        raise ValueError("pieces must hold at least one chunk, got none")
    return total / scored


def _groups(pieces: Iterable[Batch], size: int | None) -> Iterator[tuple[Iterator[Batch], bool]]:
    """Groups of ``size`` pieces (None: one of all), each with whether it is the last.

    Reads one piece ahead and no more.
    """
    remaining = iter(pieces)
    following = next(remaining, None)
    while following is not None:
        if size is None:
            yield _prepended(following, remaining), True
            return
        group = [following]
        while len(group) < size and (piece := next(remaining, None)) is not None:
            group.append(piece)
        following = next(remaining, None)
        yield iter(group), following is None


def _prepended(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest
