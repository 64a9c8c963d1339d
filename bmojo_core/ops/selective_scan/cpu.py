"""The selective scan on the CPU: compiled loops (cpu_kernels.py) as one differentiable operation.

Nothing of size b l d n is stored: forward keeps the state before every SPAN-th position and
backward recomputes the rest. Half-precision inputs are widened to float32 first. Symbols and
shapes are those of the package's docstring. The loops are registered with torch as operators, so
that a graph can be traced through them.
"""

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype
from bmojo_core.ops._numpy import as_arrays
from bmojo_core.ops._threads import run_pieces, split_tasks
from bmojo_core.ops.selective_scan.reference import step_size


def selective_scan_cpu(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, "d"] | None,
    z: Float[Tensor, "b l d"] | None,
    delta_bias: Float[Tensor, "d"] | None,
    delta_softplus: bool,
    initial_state: Float[Tensor, "b d n"] | None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """Output in the dtype of `u`, and last state; see `selective_scan` for the arguments."""
    dtype = compute_dtype(u)
    b, _, d = u.shape
    if D is None:
        D = A.new_zeros(d)
    if initial_state is None:
        initial_state = A.new_zeros(b, d, A.shape[1])
    step = step_size(delta.to(dtype), delta_bias, delta_softplus)
    tensors = (t if t is None else t.to(dtype) for t in (u, A, B, C, D, z, initial_state))
    u_wide, A, B, C, D, z, x0 = tensors
    y, last_state = _SelectiveScan.apply(u_wide, step, A, B, C, D, z, x0)
    return y.to(u.dtype), last_state


class _SelectiveScan(torch.autograd.Function):
    """The recurrence with all arguments in one dtype; gradients by hand, once differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None,
        x0: Tensor,
    ) -> tuple[Tensor, Tensor]:
        arguments = (u, delta, A, B, C, D, z, x0)
        y, last_state, checkpoints = forward(*arguments, any(ctx.needs_input_grad))
        ctx.save_for_backward(u, delta, A, B, C, D, z, checkpoints)
        return y, last_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, dz, dx0 = backward(dy, dlast, *ctx.saved_tensors)
        return *gradients, dz if ctx.needs_input_grad[6] else None, dx0


@torch.library.custom_op("bmojo::selective_scan", mutates_args=(), device_types="cpu")
def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    x0: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b, l, d), last state (b, d, n), and the states `backward` needs if `keep`."""
    kernels = _kernels()
    b, l, _ = u.shape
    n = A.shape[1]
    rate = _lanes(A, kernels.LANES)
    tiles = rate.shape[1] // kernels.LANES
    spans = -(-l // kernels.SPAN) if keep else 0
    y, last_state = u.new_empty(u.shape), u.new_empty(x0.shape)
    checkpoints = u.new_empty(b, spans, tiles, n, kernels.LANES)
    groups, pieces = _plan(b, l, tiles, n)
    inputs = as_arrays(u, delta, rate, B, C, D, u[:0] if z is None else z)
    run_pieces(
        kernels.scan_forward,
        pieces,
        groups,
        *inputs,
        z is not None,
        *as_arrays(x0, y, last_state, checkpoints),
    )
    return y, last_state, checkpoints


@forward.register_fake
def _(u, delta, A, B, C, D, z, x0, keep):
    kernels = _kernels()
    (b, l, d), n = u.shape, A.shape[1]
    spans = -(-l // kernels.SPAN) if keep else 0
    tiles = -(-d // kernels.LANES)
    checkpoints = u.new_empty(b, spans, tiles, n, kernels.LANES)
    return u.new_empty(u.shape), u.new_empty(x0.shape), checkpoints


@torch.library.custom_op("bmojo::selective_scan_backward", mutates_args=(), device_types="cpu")
def backward(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by u, delta, A, B, C, D, z (empty without z) and x0."""
    kernels = _kernels()
    b, l, d = u.shape
    n = A.shape[1]
    rate = _lanes(A, kernels.LANES)
    tiles = rate.shape[1] // kernels.LANES
    groups, pieces = _plan(b, l, tiles, n)
    du, ddelta = u.new_empty(b, l, d), u.new_empty(b, l, d)
    dz = u.new_empty((b, l, d) if z is not None else (0, l, d))
    dB, dC = u.new_empty(groups, b, l, n), u.new_empty(groups, b, l, n)
    dA = u.new_zeros(len(pieces), tiles, n, kernels.LANES)
    dD = u.new_zeros(len(pieces), tiles * kernels.LANES)
    dx0 = u.new_empty(b, d, n)
    inputs = as_arrays(u, delta, rate, B, C, D, u[:0] if z is None else z)
    run_pieces(
        kernels.scan_backward,
        pieces,
        groups,
        *inputs,
        z is not None,
        *as_arrays(checkpoints, dy, dlast),
        *as_arrays(du, ddelta, dA, dB, dC, dD, dz, dx0),
    )
    dA = dA.sum(0).transpose(1, 2).reshape(-1, n)[:d].clone()
    dD = dD.sum(0)[:d].clone()
    return du, ddelta, dA, dB.sum(0), dC.sum(0), dD, dz, dx0


@backward.register_fake
def _(dy, dlast, u, delta, A, B, C, D, z, checkpoints):
    dz = u.new_empty(u.shape) if z is not None else u.new_empty(0, *u.shape[1:])
    like = (u, delta, A, B, C, D)
    return *(u.new_empty(x.shape) for x in like), dz, u.new_empty(dlast.shape)


def _kernels() -> ModuleType:
    """The compiled loops; imported at the first use, since numba takes a while to load."""
    from bmojo_core.ops.selective_scan import cpu_kernels

    return cpu_kernels


def _lanes(A: Float[Tensor, "d n"], lanes: int) -> Float[Tensor, "n dpad"]:
    """A in units of log 2, transposed, its channels padded with zeros to whole tiles."""
    return F.pad((A / math.log(2.0)).T, (0, -A.shape[0] % lanes)).contiguous()


def _plan(b: int, l: int, tiles: int, n: int) -> tuple[int, list[tuple[int, int]]]:
    """Groups of tiles per sequence, and the pieces of the b * groups tasks.

    A sequence's channels stay in one task, unless there are too few sequences to fill the threads.
    """
    wanted = 2 * torch.get_num_threads()
    groups = min(tiles, -(-wanted // b)) if b < wanted else 1
    return groups, split_tasks(b * groups, b * l * tiles * n * 16)
