"""A tensor that is read more than once: its gradient is summed where it is made.

    y_i = x W_i^T                       dx = sum_i dy_i W_i
    (x, x W^T)    or    (x, x[index])   dx = g + dy W,    dx = g,  dx[index] += dy

Autograd forms every term and adds them up in passes of their own, each of which reads two tensors
and writes a third.  On a GPU those passes cost as much as the products they follow, so here each
term but the first is added by the operation that makes it.  Elsewhere, for modules that are more
than a matrix, and under a compiler, which fuses for itself, the plain equations run.

Where x is handed on, the gradient that comes back for it is overwritten: it must be its reader's
own, as the gradients of this library's kernels are.

Symbols: x (*b, d); W (e, d); index, valid (b, n, m): the tokens that each chunk's memory holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bmojo_core.ops._numpy import nobody_listens, nobody_watches
from bmojo_core.ops.memory_gather import add_taken, take_rows


def maps(x: Float[Tensor, "*b d"], *linears: nn.Linear) -> tuple[Float[Tensor, "*b _"], ...]:
    """``linear(x)`` for every one of several linear maps."""
    if not (_is_fast(x) and all(_is_matrix(f) for f in linears)):
        return tuple(f(x) for f in linears)
    return _Maps.apply(x, *[f.weight for f in linears])


def halves(
    x: Float[Tensor, "*b d"], linear: nn.Linear
) -> tuple[Float[Tensor, "*b e"], Float[Tensor, "*b e"]]:
    """The first and the second half of ``linear(x)``."""
    if not (_is_fast(x) and _is_matrix(linear)):
        return linear(x).chunk(2, dim=-1)
    return _Halves.apply(x, linear.weight)


def with_map(
    x: Float[Tensor, "*b d"], linear: nn.Linear
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b e"]]:
    """x, to be read on in its place, and ``linear(x)``."""
    if not (_is_fast(x) and _is_matrix(linear)):
        return x, linear(x)
    return _WithMap.apply(x, linear.weight)


def with_taken(
    k: Float[Tensor, "b l *r"],
    v: Float[Tensor, "b l *r"],
    index: Int[Tensor, "b n m"],
    valid: Bool[Tensor, "b n m"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k and v, to be read on in their place, and the rows of each that the chunks' memories hold.

    Where a place is not valid, who reads it gives it no gradient.
    """
    if not (_is_fast(k) and _is_fast(v)):
        return k, v, *take_rows((k, v), index)
    return _WithTaken.apply(k, v, index, valid)


def _is_fast(x: Tensor) -> bool:
    """Whether kernels of this library, whose gradients are their own, will read x."""
    return (
        x.is_cuda
        and x.dtype is not torch.float64
        and x.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and nobody_watches()
    )


def _is_matrix(linear: nn.Module) -> bool:
    plain = type(linear) is nn.Linear and linear.bias is None
    return plain and nobody_listens(linear)


class _Maps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, W) for W in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dy):
        x, *weights = ctx.saved_tensors
        _, *learned = ctx.needs_input_grad
        flat, dy = x.flatten(0, -2), [g.flatten(0, -2) for g in dy]
        dx = dy[0] @ weights[0]
        for g, W in zip(dy[1:], weights[1:], strict=True):
            dx.addmm_(g, W)
        return dx.reshape(x.shape), *(g.mT @ flat if l else None for g, l in zip(dy, learned))


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return tuple(F.linear(x, half) for half in W.chunk(2))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dy):
        x, W = ctx.saved_tensors
        flat, dy = x.flatten(0, -2), [g.flatten(0, -2) for g in dy]
        (first, second), dW = W.chunk(2), None
        if ctx.needs_input_grad[1]:
            dW = torch.empty_like(W)
            for g, half in zip(dy, dW.chunk(2), strict=True):
                torch.mm(g.mT, flat, out=half)
        return (dy[0] @ first).addmm_(dy[1], second).reshape(x.shape), dW


class _WithMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return x.view_as(x), F.linear(x, W)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, dy):
        x, W = ctx.saved_tensors
        g, dy = g.contiguous(), dy.flatten(0, -2)
        g.flatten(0, -2).addmm_(dy, W)
        return g, dy.mT @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None


class _WithTaken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, index, valid):
        ctx.save_for_backward(index, valid)
        return k.view_as(k), v.view_as(v), *take_rows((k, v), index)

    @staticmethod
    @once_differentiable
    def backward(ctx, gk, gv, dk, dv):
        gk, gv = gk.contiguous(), gv.contiguous()
        add_taken((gk, gv), (dk, dv), *ctx.saved_tensors)
        return gk, gv, None, None
