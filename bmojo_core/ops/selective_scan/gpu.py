"""Selective scan on the GPU: two hand-written kernels, compiled when first used.

    x_t = exp(delta_t A) x_{t-1} + delta_t B_t u_t         y_t = (C_t x_t + D u_t) silu(z_t)

How the work is cut (the kernels' own story is in ``scan_common.cu`` and ``scan_backward.cu``):

- one thread keeps 4 (or 2) states of 2 channels in registers and walks through time; the sum over
  the states is taken over 8 steps at once (4 backward), across the few lanes that share a channel;
- the state at the start of every 32 steps is kept for the backward pass (in bfloat16 where the
  inputs have half precision: half the memory of the output), which rebuilds the states between in
  registers;
- where batch x channels is too small for the chip, time is cut into segments: a first kernel finds
  what each segment adds to the state (its decay is only ``exp(A sum delta)``), then all segments
  run at once;
- ``dB`` and ``dC`` are summed over channels inside a block by exchanges between lanes, then over
  blocks in a fixed order: two runs give the same bits.

Symbols: b batch, l length, d channels, n states; u, delta, z (b, l, d); A (d, n); B, C (b, l, n);
D, delta_bias (d,); states (b, d, n). Arithmetic is float32 whatever the inputs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _nvrtc

CHANNELS, CHUNK, TILE, BACK, OCTET = 2, 32, 32, 4, 8  # as in the sources
PAD_BYTES = 16  # between rows of u and z in shared memory
MAX_STATES = 128
MOST_SEGMENTS = 16
ELEMENT = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}

_POINTERS = (
    *("u", "delta", "z", "B", "C", "A", "D", "bias", "initial", "y", "last", "checkpoints"),
    *("segment_state", "segment_time", "dy", "dlast", "du", "ddelta", "dz"),
    *("dinitial", "dparams", "dbc", "dB", "dC"),
)
_STRIDED = ("u", "delta", "z", "B", "C", "dy")
_WIDE = ("u", "delta", "z", "dy", "y", "du", "ddelta", "dz")  # (b, l, d)
_SIZES = ("b", "l", "d", "n", "chunks", "segments", "chunks_per_segment")


class Params(ctypes.Structure):
    """Mirror of the kernels' ``struct Params``."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(f"{name}_{axis}", ctypes.c_longlong) for name in _STRIDED for axis in "bl"]
        + [(name, ctypes.c_int) for name in _SIZES]
    )


@dataclass(frozen=True)
class Tiling:
    """How states and channels lie on the lanes of a block, and how time is cut.

    ``states`` states of two channels a thread; ``lanes_n`` lanes share a channel; ``segments``
    blocks share a sequence.
    """

    states: int
    lanes_n: int
    segments: int = 1

    @property
    def n_pad(self) -> int:
        """States a channel, rounded up to what its threads hold."""
        return self.states * self.lanes_n

    @property
    def warps(self) -> int:
        """Warps a block."""
        return 2 if self.lanes_n <= 2 else 4

    @property
    def threads(self) -> int:
        """Threads a block."""
        return 32 * self.warps

    @property
    def block_c(self) -> int:
        """Channels a block."""
        return self.warps * 32 // self.lanes_n * CHANNELS

    def n_shift(self, pass_: str) -> int:
        """The lane bit where the state lane begins.

        Backward it lies above two bits of channels, where there are as many: the matrix units sum
        over those. Forward the lanes of a channel are neighbours.
        """
        return 2 if pass_ == "backward" and self.lanes_n <= 8 else 0

    def forward_bytes(self, u_bytes: int, delta_bytes: int) -> int:
        """Shared memory of the walks forward: a tile at work, two as they come from memory."""
        staged = 2 * (self.block_c * (2 * u_bytes + delta_bytes) + 2 * PAD_BYTES)
        return TILE * (8 * self.block_c + 8 * self.n_pad + staged)

    def backward_bytes(self) -> int:
        """Shared memory of the backward pass: a chunk, its groups' starts, sums on their way."""
        rows = CHUNK * (12 * self.block_c + 8 * self.n_pad)
        starts = (CHUNK // BACK - 1) * CHANNELS * self.threads * 4 * self.states
        sums = 2 * self.warps * OCTET * 2 * self.n_pad * 4
        return rows + starts + sums


def lanes_for(n: int, states: int) -> int:
    """The fewest lanes, a power of two, that hold n states."""
    return 1 << max(0, -(-n // states) - 1).bit_length()


@lru_cache(maxsize=256)
def tiling(
    b: int, l: int, d: int, n: int, *, backward: bool = False, multiprocessors: int = 132
) -> Tiling:
    """The cut that keeps the chip busy.

    Four states a thread cost the fewest instructions, and two blocks a multiprocessor are enough
    of them. With fewer, two states a thread (for 9 to 16 states) make twice as many warps; going
    backward, where that would also double the parts of dB and dC, time is cut in two instead. With
    fewer than one, time is cut into segments, each of which but one is walked twice; many short
    ones then run better than few long ones. (Measured on an H200 and an H100.)
    """
    wide, chunks = Tiling(4, lanes_for(n, 4)), -(-l // CHUNK)
    blocks = b * -(-d // wide.block_c)
    enough = multiprocessors * (9 if backward else 10) // 5
    if blocks >= enough:
        return wide
    if blocks >= multiprocessors:
        if backward:
            return _in_segments(wide, chunks, 2)
        return Tiling(2, lanes_for(n, 2)) if 8 < n <= 16 else wide
    return _in_segments(wide, chunks, min(-(-8 * multiprocessors // blocks), MOST_SEGMENTS))


def _in_segments(cut: Tiling, chunks: int, wanted: int) -> Tiling:
    """Time cut into so many segments, or into fewer, of at least eight chunks."""
    per_segment = -(-chunks // max(1, min(wanted, chunks // 8)))
    return replace(cut, segments=-(-chunks // per_segment))


@dataclass(frozen=True)
class _Call:
    """The sizes, options and types of one call, and one pass's tiling."""

    b: int
    l: int
    d: int
    n: int
    u_bytes: int
    delta_bytes: int
    part: torch.dtype  # of checkpoints and of the parts of dB and dC
    defines: tuple[tuple[str, str], ...]
    device: torch.device
    tiling: Tiling

    @property
    def chunks(self) -> int:
        return -(-self.l // CHUNK)

    @property
    def blocks(self) -> int:
        return -(-self.d // self.tiling.block_c)

    def reversed(self) -> _Call:
        """The same call with the backward pass's tiling."""
        sizes = (self.b, self.l, self.d, self.n)
        count = _multiprocessors(self.device.index)
        return replace(self, tiling=tiling(*sizes, backward=True, multiprocessors=count))

    def shared_bytes(self, pass_: str) -> int:
        if pass_ == "forward":
            return self.tiling.forward_bytes(self.u_bytes, self.delta_bytes)
        return self.tiling.backward_bytes()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def segment_ends(self) -> dict[str, Tensor]:
        """What the first of two passes over segments leaves for the second."""
        t = self.tiling
        if t.segments == 1:
            return {}
        return dict(
            segment_state=self.empty(self.b, t.segments, self.d, t.n_pad),
            segment_time=self.empty(self.b, t.segments, self.d),
        )

    def launch(
        self,
        kernel: str,
        pass_: str,
        work: _Work,
        grid: tuple[int, int, int] | None = None,
    ) -> None:
        """Launch one kernel of ``scan_{pass_}.cu``, by default a block per (channels, segment)."""
        t, shared = self.tiling, self.shared_bytes(pass_)
        defines = (
            ("STATES", str(t.states)),
            ("LANES_N", str(t.lanes_n)),
            ("N_SHIFT", str(t.n_shift(pass_))),
            ("VECTORS", str(int(work.vectors))),
            ("SHARED_BYTES", str(shared)),
        )
        source = _nvrtc.read_source(
            "_intrinsics.cu", "selective_scan/scan_common.cu", f"selective_scan/scan_{pass_}.cu"
        )
        module = _nvrtc.load(source, self.defines + defines, self.device.index)
        grid = grid or (self.b * self.blocks, t.segments, 1)
        module.launch(kernel, grid, t.threads, shared, work.params)


@lru_cache(maxsize=16)
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class _Work:
    """What a launch is given: its parameters, and whether rows can be moved 16 bytes at a time."""

    params: Params
    vectors: bool

    @staticmethod
    def of(call: _Call, tensors: dict[str, Tensor | None]) -> _Work:
        segments = call.tiling.segments
        params = Params(b=call.b, l=call.l, d=call.d, n=call.n, chunks=call.chunks)
        params.segments, params.chunks_per_segment = segments, -(-call.chunks // segments)
        odd = 0  # collects the low bits of everything that must be a multiple of 16 bytes
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            address, strides = tensor.data_ptr(), tensor.stride()
            setattr(params, name, address)
            if name in _STRIDED:
                setattr(params, name + "_b", strides[0])
                setattr(params, name + "_l", strides[1])
            if name in _WIDE:
                size = tensor.element_size()
                odd |= address | size * strides[0] | size * strides[1] | size * call.d
        return _Work(params, odd % 16 == 0)


def _rows(x: Tensor | None) -> Tensor | None:
    """A (b, l, width) tensor whose rows are contiguous; views along b and l stay views, unless
    the rows of a chunk lie further apart than the kernels count in 32 bits."""
    if x is None:
        return None
    near = (CHUNK * x.stride(1) + x.shape[2]) * x.element_size() < 2**32
    return x if x.stride(-1) == 1 and near else x.contiguous()


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


class _SelectiveScan(torch.autograd.Function):
    """Forward keeps the state at every chunk's start; backward rebuilds the rest from it."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, initial, softplus, differentiable):
        call = _describe(u, delta, A, B, z, bias, softplus)
        t = call.tiling
        inputs = dict(u=_rows(u), delta=_rows(delta), z=_rows(z), B=_rows(B), C=_rows(C))
        inputs |= dict(A=_float(A), D=_float(D), bias=_float(bias), initial=_float(initial))
        y = call.empty(call.b, call.l, call.d, dtype=u.dtype)
        last = call.empty(call.b, call.d, call.n)
        checkpoints = None
        if differentiable:
            checkpoints = call.empty(call.b, call.chunks, call.d, t.n_pad, dtype=call.part)
        work = inputs | dict(y=y, last=last, checkpoints=checkpoints) | call.segment_ends()
        launched = _Work.of(call, work)
        if t.segments > 1:
            first = (call.b * call.blocks, t.segments - 1, 1)  # nobody needs what the last adds
            call.launch("scan_segment_states", "forward", launched, first)
        call.launch("scan_outputs", "forward", launched)
        ctx.set_materialize_grads(False)
        if differentiable:
            ctx.call = call
            ctx.dtypes = [None if x is None else x.dtype for x in (A, D, bias, initial)]
            ctx.save_for_backward(*inputs.values(), checkpoints)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):
        call = ctx.call.reversed()
        t = call.tiling
        *saved, checkpoints = ctx.saved_tensors
        names = ("u", "delta", "z", "B", "C", "A", "D", "bias", "initial")
        work = dict(zip(names, saved), checkpoints=checkpoints)
        u, delta, z, B = (work[name] for name in ("u", "delta", "z", "B"))
        shape = (call.b, call.l, call.d)
        dy = torch.zeros(shape, dtype=u.dtype, device=u.device) if dy is None else _rows(dy)
        work |= dict(
            dy=dy,
            dlast=_float(dlast),
            du=call.empty(*shape, dtype=u.dtype),
            ddelta=call.empty(*shape, dtype=delta.dtype),
            dz=None if z is None else call.empty(*shape, dtype=z.dtype),
            dB=call.empty(call.b, call.l, call.n, dtype=B.dtype),
            dC=call.empty(call.b, call.l, call.n, dtype=B.dtype),
            dparams=call.empty(call.b * t.segments, call.d, t.n_pad + 2),
            dbc=call.empty(call.blocks, call.b, call.l, 2 * t.n_pad, dtype=call.part),
        )
        if work["initial"] is not None:
            work["dinitial"] = call.empty(call.b, call.d, call.n)
        work |= call.segment_ends()
        launched = _Work.of(call, work)
        if t.segments > 1:
            call.launch("scan_segment_gradients", "forward", launched)
        call.launch("scan_gradients", "backward", launched)
        sums = -(-call.b * call.l * 2 * t.n_pad // t.threads)
        call.launch("scan_sum_over_channels", "backward", launched, (sums, 1, 1))
        return (*_gradients(call, work, ctx.dtypes), None, None)


def _gradients(call: _Call, work: dict, dtypes: list) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the inputs, each in its input's type."""
    A_type, D_type, bias_type, initial_type = dtypes
    total = work["dparams"].sum(0)
    n_pad = call.tiling.n_pad
    dA = total[:, : call.n].to(A_type)
    dD = None if D_type is None else total[:, n_pad].to(D_type)
    dbias = None if bias_type is None else total[:, n_pad + 1].to(bias_type)
    dinitial = None if initial_type is None else work["dinitial"].to(initial_type)
    first = (work["du"], work["ddelta"], dA, work["dB"], work["dC"])
    return (*first, dD, work["dz"], dbias, dinitial)


def _describe(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> _Call:
    (b, l, d), n = u.shape, A.shape[-1]
    defines = (
        ("U_T", ELEMENT[u.dtype]),
        ("DELTA_T", ELEMENT[delta.dtype]),
        ("BC_T", ELEMENT[B.dtype]),
        ("HAS_Z", str(int(z is not None))),
        ("HAS_BIAS", str(int(bias is not None))),
        ("SOFTPLUS", str(int(softplus))),
    )
    cut = tiling(b, l, d, n, multiprocessors=_multiprocessors(u.device.index))
    part = torch.bfloat16 if u.element_size() == B.element_size() == 2 else torch.float32
    sizes = (u.element_size(), delta.element_size())
    return _Call(b, l, d, n, *sizes, part, defines, u.device, cut)


def selective_scan_gpu(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Tensor, "b d n"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """Selective scan and its last state, differentiable in every tensor argument.

    Parameters
    ----------
    u, delta, z : Tensor, (b, l, d)
        Input, step size, gate: float32, bfloat16 or float16; z has the type of u. Any strides
        along b and l.
    A : Tensor, (d, n)
        Continuous-time decay rates, n <= 128.
    B, C : Tensor, (b, l, n)
        Input and output maps, of one type.
    D, delta_bias : Tensor, (d,), optional
    delta_softplus : bool
        Whether the step size is ``softplus(delta + delta_bias)``.
    initial_state : Tensor, (b, d, n), optional
        State before the first step; zero if not given.

    Returns
    -------
    y : Tensor, (b, l, d)
        Of the type of u.
    last_state : Tensor, (b, d, n)
        float32.

    Raises
    ------
    ValueError
        For tensors that are not on one CUDA device, types other than the three above, or n > 128.
    """
    for name, x in {"u": u, "delta": delta, "B": B, "C": C}.items():
        if x.dtype not in ELEMENT:
            allowed = "float32, bfloat16 or float16 (float64: use backend='reference')"
            raise ValueError(f"{name} has dtype {x.dtype}; the gpu backend takes {allowed}")
    if B.dtype != C.dtype or (z is not None and z.dtype != u.dtype):
        raise ValueError("B and C must have one dtype, and z the dtype of u")
    if A.shape[-1] > MAX_STATES:
        raise ValueError(f"A has {A.shape[-1]} states; the gpu backend takes at most {MAX_STATES}")
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    given = [x for x in tensors if x is not None]
    _require_cuda(given)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return _SelectiveScan.apply(*tensors, bool(delta_softplus), differentiable)


def _require_cuda(tensors: list[Tensor]) -> None:
    devices = {x.device for x in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise ValueError(f"the gpu backend needs all tensors on one CUDA device, got {devices}")
