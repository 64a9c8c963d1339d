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
from torch.autograd.function import once_differentiable

from bmojo_core.ops._checks import compute_dtype


def innovation_cpu(
    y: Float[Tensor, "b l d"],
    weights: Float[Tensor, "taps"],
    past: Float[Tensor, "b taps d"] | None,
) -> Float[Tensor, "b l"]:
    """Innovation by shifted sums; see ``bmojo_core.ops.innovation``."""
    dtype = compute_dtype(y)
    y, weights, taps = y.to(dtype), weights.to(dtype), weights.shape[0]
    outputs = F.pad(y, (0, 0, taps, 0)) if past is None else torch.cat([past.to(dtype), y], dim=1)
    return _Innovation.apply(outputs, weights)


class _Innovation(torch.autograd.Function):
    """e_t = mean_d r_t^2, r_t = o_t - sum_j w_j o_{t-j}, for outputs o that begin `taps` early.

    With s_t = (2 / d) g_t r_t for the gradient g of e: do_t = s_t - sum_j w_j s_{t+j} and
    dw_j = -sum_t s_t . o_{t-j}. By hand because each shifted sum can then be added in place.
    """

    @staticmethod
    def forward(ctx, outputs: Tensor, weights: Tensor) -> Tensor:
        taps = weights.shape[0]
        error = outputs[:, taps:].clone()
        for j in range(1, taps + 1):
            error.addcmul_(outputs[:, taps - j : -j], weights[j - 1], value=-1)
        ctx.save_for_backward(outputs, weights, error)
        return error.square().mean(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs, weights, error = ctx.saved_tensors
        taps = weights.shape[0]
        slope = error * (2.0 / error.shape[-1] * grad)[..., None]
        grad_outputs = F.pad(slope, (0, 0, taps, 0))
        for j in range(1, taps + 1):
            grad_outputs[:, taps - j : -j].addcmul_(slope, weights[j - 1], value=-1)
        if not ctx.needs_input_grad[1]:
            return grad_outputs, None
        lags = [-(slope * outputs[:, taps - j : -j]).sum() for j in range(1, taps + 1)]
        return grad_outputs, torch.stack(lags)


def running_top_k_cpu(
    scores: Float[Tensor, "b l"], k: int, chunk: int
) -> tuple[Int[Tensor, "b c k"], Bool[Tensor, "b c k"]]:
    """Algorithm 1's insertions, compiled; see ``bmojo_core.ops.innovation``."""
    return torch.ops.bmojo.running_top_k(scores, k, chunk)


@torch.library.custom_op(
    "bmojo::running_top_k",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor scores, int k, int chunk) -> (Tensor, Tensor)",
)
def _running_top_k(scores: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    index, valid = _empty_memories(scores, k, chunk)
    wide = scores.detach().to(compute_dtype(scores)).contiguous()
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
