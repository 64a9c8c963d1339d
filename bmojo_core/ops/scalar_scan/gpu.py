r"""The scalar scan on the GPU: chunks of positions as products for the matrix units.

With s_i the sum of log-decays delta A from a chunk's beginning to its position i, L_ij =
exp(s_i - s_j) for j <= i and 0 above the diagonal, X the state before the chunk:

    added = sum_j exp(s_last - s_j) delta_j u_j B_j^T       every chunk for itself
    X'    = exp(s_last) X + added                           chunk after chunk, elementwise
    y_i   = sum_j L_ij (C_i . B_j) delta_j u_j + exp(s_i) X C_i            every chunk for itself

The backward pass has the same three steps; R is the gradient of the state after the chunk:

    asked   = sum_i exp(s_i) dy_i C_i^T ,     R_before = exp(s_last) R + asked
    du_j    = delta_j [ sum_i L_ij (C_i . B_j) dy_i + exp(s_last - s_j) R B_j ]
    dB_j    = sum_i L_ij delta_j (dy_i . u_j) C_i + exp(s_last - s_j) delta_j R^T u_j
    dC_i    = sum_j L_ij delta_j (dy_i . u_j) B_j + exp(s_i) X^T dy_i          (both over heads)
    da_m    = the sum of what passes position m: pairs j < m <= i, X's share in y_i (i >= m)
              and in X' (all m), u_j's share in X' (j < m)

The sums s are taken in float64 and kept as a float32 and its remainder, so that their differences
are right after a long forgetting, too; all of them are <= 0 where A is. Nothing is added by
atomics: two runs give the same bits. States between chunks are rounded to bfloat16 for the products
where u is, never for the recurrence; float16, in which they could overflow, keeps them in float32.
The kernels are in ``kernels.py``; steps (softplus
and bias) and delta A stay with torch, they are d / h times smaller than u.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype
from bmojo_core.ops.scalar_scan import kernels
from bmojo_core.ops.selective_scan.reference import step_size

WIDEST_HEAD, MOST_STATES = 64, 128
SHORT, LONG = 32, 64  # positions of a chunk in float32 and in half precision
BLOCK = 1024  # elements of a state that one program passes on
MOST_PROGRAMS = 65535  # along the second and the third axis of a grid
MOST_HEADS = 8  # heads that a program takes, one after another
ENOUGH = 1024  # programs that keep a GPU busy
# Warps of a backward program. Four are faster at 64 channels and 64 states, but in other sizes
# Triton 3.6 then makes wrong gradients and leaves its memory (times, tests and compute-sanitizer's
# word of such a run are in results/gpu_tests_four_warps.json).
WARPS = 8


def covers(p: int, n: int) -> bool:
    """Whether the kernels take heads of `p` channels with `n` states."""
    return p <= WIDEST_HEAD and n <= MOST_STATES


def scalar_scan_gpu(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, "d"] | None,
    z: Float[Tensor, "b l d"] | None,
    delta_bias: Float[Tensor, "h"] | None,
    delta_softplus: bool,
    initial_state: Float[Tensor, "b d n"] | None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """Output in the dtype of `u`, and last state; see `scalar_scan` for the arguments.

    Raises
    ------
    ValueError
        If `u` is float64 or not on a CUDA device, heads or states are wider than the kernels take,
        or there are more than 65535 rows or heads.
    """
    _require_cuda(u)
    p, n = u.shape[-1] // A.shape[0], B.shape[-1]
    if u.dtype == torch.float64:
        raise ValueError("u is float64; the gpu backend takes float32, float16 and bfloat16")
    if not covers(p, n):
        raise ValueError(
            f"heads have {p} channels and n={n} states; the gpu backend takes at most "
            f"{WIDEST_HEAD} and {MOST_STATES}"
        )
    if max(u.shape[0], A.shape[0]) > MOST_PROGRAMS:
        raise ValueError(
            f"b={u.shape[0]} rows of {A.shape[0]} heads; the gpu backend takes {MOST_PROGRAMS} each"
        )
    step = step_size(delta.to(compute_dtype(u)), delta_bias, delta_softplus)
    B, C, z = (x if x is None else x.to(u.dtype) for x in (B, C, z))
    if initial_state is None:
        initial_state = torch.zeros(u.shape[0], u.shape[2], n, device=u.device)
    with torch.cuda.device_of(u):  # Triton launches where the current device is
        return _ScalarScan.apply(u, step, step * A.float(), B, C, D, z, initial_state.float())


def _require_cuda(u: Tensor) -> None:
    if not u.is_cuda:
        raise ValueError(f"the gpu backend needs tensors on a CUDA device; u is on {u.device}")


class _ScalarScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, step, decay, B, C, D, z, start):
        u, B, C, z = (_unit_stride(x) for x in (u, B, C, z))
        D, start = (x if x is None else x.contiguous() for x in (D, start))
        job = _Job.of(u, step, B, D, z)
        times = _times(job, step.contiguous(), decay.contiguous())
        added, held = job.states(torch.float32), job.states(_kept(u))
        kernels.chunk_states[job.every](
            u, B, *times, added, *_strides(u, B), job.l, job.chunks, **job.constants
        )
        last = _pass_on(job, added, start, times, held, backward=False)
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        _launch_outputs(job, u, z, B, C, D, times, held, y)
        ctx.save_for_backward(u, B, C, D, z, *times, held)
        ctx.job = job
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):
        u, B, C, D, z, *times, held = ctx.saved_tensors
        dy, dlast, job = _unit_stride(dy), dlast.contiguous(), ctx.job
        asked, future = job.states(torch.float32), job.states(_kept(u))
        kernels.chunk_state_gradients[job.every](
            dy, z, C, *times[1:], asked, *_strides(dy, z, C), job.l, job.chunks,
            HAS_Z=z is not None, **job.constants,
        )  # fmt: skip
        dstart = _pass_on(job, asked, dlast, times, future, backward=True)
        inputs = (dy, u, z, B, C, D)
        du, dstep, ddecay, dB, dC, dD, dz = _launch_gradients(job, *inputs, times, held, future)
        return du, dstep, ddecay, dB, dC, dD, dz, dstart


@dataclass(frozen=True)
class _Job:
    """Sizes of one call and where it runs; `q` positions a chunk, `per` heads a program."""

    b: int
    l: int
    h: int
    p: int
    n: int
    q: int
    per: int
    wide: bool  # float32: products in three tf32 passes
    device: torch.device

    @staticmethod
    def of(u: Tensor, step: Tensor, B: Tensor, D: Tensor | None, z: Tensor | None) -> _Job:
        (b, l, d), h, wide = u.shape, step.shape[-1], u.dtype == torch.float32
        q = SHORT if wide else LONG
        per = max(1, min(MOST_HEADS, b * -(-l // q) * h // ENOUGH))
        return _Job(b, l, h, d // h, B.shape[-1], q, per, wide, u.device)

    @property
    def chunks(self) -> int:
        return -(-self.l // self.q)

    @property
    def every(self) -> tuple[int, int, int]:
        """A program a chunk and head."""
        return self.chunks, self.h, self.b

    @property
    def shared(self) -> tuple[int, int, int]:
        """A program a chunk and `per` heads."""
        return self.chunks, -(-self.h // self.per), self.b

    @property
    def constants(self) -> dict[str, int | str]:
        return dict(
            H=self.h,
            P=self.p,
            N=self.n,
            P_PAD=max(16, triton.next_power_of_2(self.p)),
            N_PAD=max(16, triton.next_power_of_2(self.n)),
            Q=self.q,
            PRECISION="tf32x3" if self.wide else "tf32",
        )

    def states(self, dtype: torch.dtype) -> Float[Tensor, "b k h p n"]:
        """Room for a state a chunk and head."""
        shape = (self.b, self.chunks, self.h, self.p, self.n)
        return torch.empty(shape, dtype=dtype, device=self.device)


def _kept(u: Tensor) -> torch.dtype:
    """Of the states between chunks: sums have no bound that float16 would reach."""
    return torch.float32 if u.dtype == torch.float16 else u.dtype


def _unit_stride(x: Tensor | None) -> Tensor | None:
    """Rows that are contiguous, and near enough for a chunk of them to be counted in 32 bits."""
    near = x is None or LONG * x.stride(1) + x.shape[2] < 2**31
    return x if x is None or (x.stride(-1) == 1 and near) else x.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    """Strides of batch and time of each tensor; zeros stand for one that is not there."""
    return [s for x in tensors for s in ((0, 0) if x is None else x.stride()[:2])]


def _times(job: _Job, step: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps, sums of log-decays and their remainders, each (b, h, k, q)."""
    shape = (job.b, job.h, job.chunks, job.q)
    times = tuple(torch.empty(shape, dtype=torch.float32, device=job.device) for _ in range(3))
    kernels.sums[job.every](step, decay, *times, job.l, job.chunks, H=job.h, Q=job.q)
    return times


def _pass_on(
    job: _Job, added: Tensor, start: Tensor, times: tuple, held: Tensor, backward: bool
) -> Float[Tensor, "b d n"]:
    """Fill `held` with what every chunk finds; return what comes after the last of them."""
    end = torch.empty_like(start)
    size = job.p * job.n
    block = min(BLOCK, triton.next_power_of_2(size))
    way = (job.chunks - 1, -1) if backward else (0, 1)
    kernels.pass_states[(-(-size // block), job.h, job.b)](
        added, start, *times[1:], held, end, job.chunks, *way, H=job.h, SIZE=size, BLOCK=block,
        Q=job.q,
    )  # fmt: skip
    return end


def _launch_outputs(job: _Job, u, z, B, C, D, times, held, y) -> None:
    kernels.outputs[job.shared](
        u, z, B, C, D, *times, held, y, *_strides(u, z, B, C), job.l, job.chunks, job.per,
        HAS_Z=z is not None, HAS_D=D is not None, **job.constants,
        num_warps=4, num_stages=1 if job.wide else 2,
    )  # fmt: skip


def _launch_gradients(job: _Job, dy, u, z, B, C, D, times, held, future) -> tuple:
    """Gradients of u, step, delta A, B, C, D and z."""
    du, dz = (
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, z)
    )
    wide = dict(dtype=torch.float32, device=job.device)
    dstep, ddecay = (torch.empty(job.b, job.l, job.h, **wide) for _ in range(2))
    dB, dC = (torch.empty(job.shared[1], job.b, job.l, job.n, **wide) for _ in range(2))
    dD = None if D is None else torch.empty(job.b, job.chunks, u.shape[-1], **wide)
    sizes = (*_strides(dy, u, z, B, C), job.l, job.chunks)
    kernels.head_gradients[job.every](
        dy, u, z, B, C, D, *times, held, future, du, dz, dD, dstep, ddecay, *sizes,
        HAS_Z=z is not None, HAS_D=D is not None, **job.constants,
        num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    kernels.shared_gradients[job.shared](
        dy, u, z, B, C, *times, held, future, dB, dC, *sizes, job.per,
        HAS_Z=z is not None, **job.constants, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    dB, dC = (x.sum(0).to(u.dtype) for x in (dB, dC))
    dD = None if D is None else dD.sum((0, 1)).to(D.dtype)
    return du, dstep, ddecay, dB, dC, dD, dz
