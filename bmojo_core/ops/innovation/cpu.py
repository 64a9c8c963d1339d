"""Innovation as a short causal filter, and Algorithm 1's memory as a compiled loop.

    e_t = mean_d (y_t - sum_j w_j y_{t-j})^2       one pass a tap over all times at once
    M   = k slots in order of position; the newest token is appended, the smallest removed

y (b, l, d); w (taps,); scores (b, l); index, valid (b, c, k).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def innovation_cpu(
    y: Float[Tensor, "b l d"],
    weights: Float[Tensor, "taps"],
    past: Float[Tensor, "b taps d"] | None,
) -> Float[Tensor, "b l"]:
    """Innovation by shifted sums; see ``bmojo_core.ops.innovation``."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    y, weights = y.to(dtype), weights.to(dtype)
    l, taps = y.shape[1], weights.shape[0]
    outputs = F.pad(y, (0, 0, taps, 0)) if past is None else torch.cat([past.to(dtype), y], dim=1)
    error = y
    for j in range(1, taps + 1):
        error = torch.addcmul(error, outputs[:, taps - j : taps - j + l], weights[j - 1], value=-1)
    return error.square().mean(dim=-1)


def running_top_k_cpu(
    scores: Float[Tensor, "b l"], k: int, chunk: int
) -> tuple[Int[Tensor, "b c k"], Bool[Tensor, "b c k"]]:
    """Algorithm 1's insertions, compiled; see ``bmojo_core.ops.innovation``."""
    return torch.ops.bmojo.running_top_k(scores, k, chunk)


@torch.library.custom_op("bmojo::running_top_k", mutates_args=(), device_types="cpu")
def _running_top_k(scores: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    index, valid = _empty_memories(scores, k, chunk)
    wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).contiguous()
    _insert_in_order()(wide.numpy(), chunk, index.numpy(), valid.numpy())
    return index, valid


@_running_top_k.register_fake
def _empty_memories(scores: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], -(-scores.shape[1] // chunk), k)
    index = torch.zeros(shape, dtype=torch.int64, device=scores.device)
    return index, torch.zeros(shape, dtype=torch.bool, device=scores.device)


@cache
def _insert_in_order():
    """Compile on first use, so that importing this module does not import numba."""
    from bmojo_core.ops.innovation.cpu_kernels import insert_in_order

    return insert_in_order
