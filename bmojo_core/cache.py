"""The state of a model between two calls: all that is remembered, of constant size.

A B'MOJO block carries, for each row (elements, not bytes):

    (k-1) e + e n        convolution tail and SSM state          fading memory
    2 w g p              ring of keys and values                 window
    2 m g p              memory in use by the present chunk      m = m_f + m_e
    2 m_e g p            the best tokens so far
    s d + g p            past outputs for predictor and fading tokens; sum of keys

and the scores and positions of what it remembers.  Nothing grows with what has been read; only
full ``attention`` sublayers, which a B'MOJO does not have, keep everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class BMojoCache:
    """States of all sublayers and how many tokens each row has read.

    Attributes
    ----------
    states
        One named tuple of tensors a sublayer (None for sublayers without memory).
    position
        Tokens read by each row (b,), or None before the first call.
    """

    def __init__(self, states: list[Any] | None = None, position: Tensor | None = None) -> None:
        self.states = states
        self.position = position
        self._shared = False

    def __repr__(self) -> str:
        read = None if self.position is None else self.position.tolist()
        return f"BMojoCache(tokens read: {read}, bytes: {self.nbytes})"

    def is_empty(self) -> bool:
        """Whether nothing has been read yet."""
        return self.position is None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Most tokens read by any row (transformers' name for it)."""
        return 0 if self.position is None else int(self.position.max())

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the state."""
        if self.position is not None:
            yield self.position
        yield from _leaves(self.states or [])

    @property
    def nbytes(self) -> int:
        """Bytes held, over all rows and sublayers."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def map(self, function) -> BMojoCache:
        """A cache of ``function(tensor)`` for every tensor."""
        position = None if self.position is None else function(self.position)
        return BMojoCache(_map(function, self.states), position)

    def detach(self) -> BMojoCache:
        """The same values without their history: truncated backpropagation (appendix B.2)."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> BMojoCache:
        """Move to a device; floating-point tensors also take a dtype given."""
        return self.map(lambda t: _to(t, *args, **kwargs))

    def select(self, rows: Tensor) -> BMojoCache:
        """The states of the given rows (b',), which may repeat: beams, or a smaller batch."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows take the states of ``beam_idx``, in place (transformers' beam search)."""
        chosen = self.select(beam_idx)
        self.states, self.position, self._shared = chosen.states, chosen.position, False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, in place (transformers' beam search)."""
        chosen = self.map(lambda t: t.repeat_interleave(repeats, dim=0))
        self.states, self.position, self._shared = chosen.states, chosen.position, False

    def fork(self) -> BMojoCache:
        """A second cache that goes on from here; tensors are shared until one of the two writes."""
        twin = BMojoCache(self.states, self.position)
        self._shared = twin._shared = True
        return twin

    def own(self) -> None:
        """Make sure that writing here is seen by no fork: copy what is shared."""
        if self._shared:
            copied = self.map(Tensor.clone)
            self.states, self.position, self._shared = copied.states, copied.position, False


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _leaves(branch)


def _map(function, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        return type(tree)(*(_map(function, branch) for branch in tree))
    if isinstance(tree, list):
        return [_map(function, branch) for branch in tree]
    return tree


def _to(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if t.is_floating_point():
        return t.to(*args, **kwargs)
    device = kwargs.get("device") or next((a for a in args if not isinstance(a, torch.dtype)), None)
    return t if device is None else t.to(device)
