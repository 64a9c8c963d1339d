"""The equations of the memory's gather, row by row of the flattened tensors."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def rows_of(index: Int[Tensor, "b n m"], length: int) -> Int[Tensor, "bnm"]:
    """Where (b, index[b, n, i]) is among b x length flattened rows."""
    first = torch.arange(index.shape[0], device=index.device) * length
    return (index + first[:, None, None]).flatten()


def take_reference(
    x: Float[Tensor, "b l *r"], index: Int[Tensor, "b n m"]
) -> Float[Tensor, "b n m *r"]:
    """taken[b, n, i] = x[b, index[b, n, i]]."""
    rows = rows_of(index, x.shape[1])
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, index.shape)


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
