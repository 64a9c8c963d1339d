"""The causal convolution on the CPU: compiled loops (cpu_kernels.py), differentiable.

The loops do the linear filter a = weight * (initial_state, x) + bias; the activation is torch's,
and backward recomputes `a` rather than storing it. Half-precision inputs are widened to float32.
The loops are registered with torch as operators, so that a graph can be traced through them.
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype
from bmojo_core.ops._numpy import as_arrays
from bmojo_core.ops._threads import run_pieces, split_tasks


def causal_conv1d_cpu(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, "d"] | None,
    initial_state: Float[Tensor, "b k-1 d"] | None,
    activation: str | None,
) -> Float[Tensor, "b l d"]:
    """Output in the dtype of `x`; see `causal_conv1d` for the arguments."""
    dtype = compute_dtype(x)
    b, _, d = x.shape
    if bias is None:
        bias = weight.new_zeros(d)
    if initial_state is None:
        initial_state = weight.new_zeros(b, weight.shape[1] - 1, d)
    wide = (t.to(dtype) for t in (x, weight, bias, initial_state))
    return _CausalConv.apply(*wide, activation == "silu").to(x.dtype)


class _CausalConv(torch.autograd.Function):
    """Filter and activation with all arguments in one dtype; once differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, past: Tensor, silu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, past)
        ctx.silu = silu
        a = linear_filter(x, weight, bias, past)
        # traced, a result changed in place has no gradient in torch 2.11
        return F.silu(a, inplace=not torch.compiler.is_compiling()) if silu else a

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, past = ctx.saved_tensors
        if ctx.silu:
            dy = torch.ops.aten.silu_backward(dy, linear_filter(x, weight, bias, past))
        return *linear_filter_gradients(x, weight, past, dy), None


@torch.library.custom_op("bmojo::causal_filter", mutates_args=(), device_types="cpu")
def linear_filter(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor) -> Tensor:
    """a (b, l, d) before the activation."""
    a = x.new_empty(x.shape)
    pieces = split_tasks(x.shape[0], x.numel() * weight.shape[1])
    arrays = as_arrays(x, weight.T, bias, past, a)
    run_pieces(_kernels().filter_forward, pieces, *arrays)
    return a


@linear_filter.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("bmojo::causal_filter_gradients", mutates_args=(), device_types="cpu")
def linear_filter_gradients(
    x: Tensor, weight: Tensor, past: Tensor, da: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, weight, bias and past, given the one by a."""
    d, k = weight.shape
    pieces = split_tasks(x.shape[0], x.numel() * k)
    dx, dpast = x.new_empty(x.shape), past.new_empty(past.shape)
    dweight, dbias = x.new_zeros(len(pieces), k, d), x.new_zeros(len(pieces), d)
    arrays = as_arrays(x, weight.T, past, da, dx, dweight, dbias, dpast)
    run_pieces(_kernels().filter_backward, pieces, *arrays)
    return dx, dweight.sum(0).T.contiguous(), dbias.sum(0), dpast


@linear_filter_gradients.register_fake
def _(x: Tensor, weight: Tensor, past: Tensor, da: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1], past.shape)
    return tuple(x.new_empty(shape) for shape in shapes)


def _kernels() -> ModuleType:
    """The compiled loops; imported at the first use, since numba takes a while to load."""
    from bmojo_core.ops.causal_conv import cpu_kernels

    return cpu_kernels
