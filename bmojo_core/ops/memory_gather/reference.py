"""The equations of the memory's gather, row by row of the flattened tensors."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def rows_of(index: Int[Tensor, "b *i"], length: int) -> Int[Tensor, "s"]:
    """Where (b, index[b, ...]) is among the flattened rows of so many columns, in order."""
    if index.shape[0] > 1 and length:
        first = torch.arange(0, index.shape[0] * length, length, device=index.device)
        index = index + first.reshape(-1, *[1] * (index.ndim - 1))
    return index.flatten()


def take_reference(
    x: tuple[Float[Tensor, "b l *r"], ...], index: Int[Tensor, "b n m"]
) -> tuple[Float[Tensor, "b n m *r"], ...]:
    """taken[b, n, i] = x[b, index[b, n, i]] of every x."""
    rows = rows_of(index, x[0].shape[1])
    return tuple(y.flatten(0, 1).index_select(0, rows).unflatten(0, index.shape) for y in x)


def add_taken_reference(
    g: tuple[Float[Tensor, "b l *r"], ...],
    dtaken: tuple[Float[Tensor, "b n m *r"], ...],
    index: Int[Tensor, "b n m"],
    valid: Bool[Tensor, "b n m"],
) -> None:
    """g[b, index[b, n, i]] += dtaken[b, n, i] where valid."""
    rows = rows_of(index, g[0].shape[1])[valid.flatten()]
    for total, terms in zip(g, dtaken, strict=True):
        total.flatten(0, 1).index_add_(0, rows, terms.flatten(0, 2)[valid.flatten()])
