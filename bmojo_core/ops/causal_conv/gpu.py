"""Causal depthwise convolution with SiLU on the GPU: one kernel forward, one backward.

    y_t = act( sum_{j=1..k} weight_j x_{t-k+j} + bias )

Every input is read once (but for the k-1 rows that neighbouring tiles share) and every output
written once. The gradients of ``weight`` and ``bias`` are summed tile by tile in a fixed order: two
runs give the same bits. The kernels are in ``conv.cu``; they are compiled when first used
(``ops/_nvrtc.py``).

x (b, l, d); weight (d, k); bias (d,); initial_state (b, k-1, d): the k-1 inputs before x.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _nvrtc

THREADS = 128  # as in the source
WIDTH = 8  # bytes a thread moves; wider rows leave too few registers to wait for memory with
MOST_TAPS = 32
SHORTEST = 16  # steps a thread walks at least: it reads k-1 more
FULL = 0.9  # a wave that fills so much of the chip is full enough
ELEMENT = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}

_POINTERS = (*("x", "dy", "initial", "weight", "bias", "y", "dx", "dinitial", "partial"),)
_STRIDES = ("x_b", "x_l", "dy_b", "dy_l")
_SIZES = ("b", "l", "d", "tile", "tiles")


class Params(ctypes.Structure):
    """Mirror of the kernels' ``struct Params``."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_longlong) for name in _STRIDES]
        + [(name, ctypes.c_int) for name in _SIZES]
    )


@dataclass(frozen=True)
class Residency:
    """What a pass asks of a multiprocessor.

    ``ahead`` rows of a thread are on their way at once; registers are cut so that ``blocks`` blocks
    fit (for up to four taps, the filters of sequence models; others take the registers they need).
    Both kept in registers without spilling, by the compiler's word for sm_90.
    """

    ahead: int
    blocks: int


FORWARD, BACKWARD = Residency(ahead=16, blocks=3), Residency(ahead=6, blocks=4)


@dataclass(frozen=True)
class _Call:
    b: int
    l: int
    d: int
    taps: int
    silu: bool
    dtype: torch.dtype
    device: torch.device

    def tile(self, residency: Residency, vector: int) -> int:
        """Steps a thread walks in a pass, by the chip at hand."""
        resident = THREADS * residency.blocks * _multiprocessors(self.device.index)
        return _tile(self.l, max(1, self.b * (self.d // vector)), resident)

    def launch(
        self, kernel: str, tensors: dict[str, Tensor | None], vector: int, tile: int
    ) -> None:
        params = Params(b=self.b, l=self.l, d=self.d, tile=tile, tiles=-(-self.l // tile))
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            setattr(params, name, tensor.data_ptr())
            if name in ("x", "dy"):
                setattr(params, f"{name}_b", tensor.stride(0))
                setattr(params, f"{name}_l", tensor.stride(1))
        defines = (
            ("X_T", ELEMENT[self.dtype]),
            ("K", str(self.taps)),
            ("VECTOR", str(vector)),
            ("SILU", str(int(self.silu))),
        )
        for name, asked in (("FORWARD", FORWARD), ("BACKWARD", BACKWARD)):
            blocks = asked.blocks if self.taps <= 4 else 1
            defines += ((f"{name}_AHEAD", str(asked.ahead)), (f"{name}_BLOCKS", str(blocks)))
        source = _nvrtc.read_source("_intrinsics.cu", "causal_conv/conv.cu")
        module = _nvrtc.load(source, defines, self.device.index)
        threads = self.b * params.tiles * (self.d // vector)
        if threads == 0:
            return
        module.launch(kernel, (-(-threads // THREADS), 1, 1), THREADS, 0, params)


def _vector(taps: int, d: int, *rows: Tensor) -> int:
    """Channels a thread moves at once: eight bytes, if every row of every tensor allows it and the
    filter leaves the registers."""
    size = rows[0].element_size()
    most = 4 if taps <= 8 else 2 if taps <= 16 else 1
    vector = min(WIDTH // size, most)
    steps = [d, *(s for x in rows for s in (x.data_ptr() // size, x.stride(0), x.stride(1)))]
    return 1 if any(step % vector for step in steps) else vector


def _tile(l: int, lanes: int, resident: int) -> int:
    """Steps a thread walks, for ``lanes`` threads a tile and ``resident`` threads at once.

    As few waves of threads as leave the chip full, up to three, and as few tiles.
    """
    found = (0.0, 1)
    for waves in (1, 2, 3):
        tiles = max(1, min(waves * resident // lanes, l // SHORTEST))
        found = max(found, (tiles * lanes / (waves * resident), tiles), key=lambda f: f[0])
        if found[0] >= FULL:
            break
    return -(-l // found[1])


@lru_cache(maxsize=16)
def _multiprocessors(device: int | None) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial, silu):
        (b, l, d), k = x.shape, weight.shape[1]
        call = _Call(b, l, d, k, silu, x.dtype, x.device)
        x = _rows(x)
        y = torch.empty(b, l, d, dtype=x.dtype, device=x.device)
        start = _float(initial)
        if start is not None and start.data_ptr() % 16:
            start = start.clone()  # rows are read four channels at a time
        tensors = dict(x=x, weight=_float(weight), bias=_float(bias), initial=start)
        vector = _vector(k, d, x)
        call.launch("conv_forward", tensors | dict(y=y), vector, call.tile(FORWARD, vector))
        ctx.call = call
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias, initial)]
        ctx.save_for_backward(*tensors.values())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        call = ctx.call
        tensors = dict(zip(("x", "weight", "bias", "initial"), ctx.saved_tensors))
        x, initial, dy = tensors["x"], tensors["initial"], _rows(dy)
        vector = _vector(call.taps, call.d, x, dy)
        tile = call.tile(BACKWARD, vector)
        parts = call.b * -(-call.l // tile)
        gradients = dict(
            dy=dy,
            dx=torch.empty(call.b, call.l, call.d, dtype=x.dtype, device=x.device),
            dinitial=None if initial is None else torch.empty_like(initial),
            partial=torch.empty(parts, call.taps + 1, call.d, device=x.device),
        )
        call.launch("conv_backward", tensors | gradients, vector, tile)
        total = gradients["partial"].sum(0)
        weight_type, bias_type, initial_type = ctx.dtypes
        dweight = total[: call.taps].t().to(weight_type)
        dbias = None if bias_type is None else total[call.taps].to(bias_type)
        dinitial = None if initial_type is None else gradients["dinitial"].to(initial_type)
        return gradients["dx"], dweight, dbias, dinitial, None


def causal_conv1d_gpu(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "b k-1 d"] | None = None,
    activation: str | None = None,
) -> Float[Tensor, "b l d"]:
    """Causal depthwise convolution; see ``bmojo_core.ops.causal_conv``.

    Parameters
    ----------
    x : Tensor, (b, l, d)
        float32, bfloat16 or float16, any strides along b and l.
    weight : Tensor, (d, k)
        k <= 32.
    bias : Tensor, (d,), optional
    initial_state : Tensor, (b, k-1, d), optional
    activation : None or "silu"

    Returns
    -------
    y : Tensor, (b, l, d)
        Of x's type; sums are float32.

    Raises
    ------
    ValueError
        For tensors that are not on one CUDA device, another type, or more than 32 taps.
    """
    if x.dtype not in ELEMENT:
        allowed = "float32, bfloat16 or float16 (float64: use backend='reference')"
        raise ValueError(f"x has dtype {x.dtype}; the gpu backend takes {allowed}")
    if weight.shape[1] > MOST_TAPS:
        raise ValueError(f"weight has {weight.shape[1]} taps; the gpu backend takes {MOST_TAPS}")
    _require_cuda([t for t in (x, weight, bias, initial_state) if t is not None])
    if weight.shape[1] == 1:
        initial_state = None  # (b, 0, d): one tap has no past
    return _CausalConv.apply(x, weight, bias, initial_state, activation == "silu")


def _require_cuda(tensors: list[Tensor]) -> None:
    devices = {x.device for x in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise ValueError(f"the gpu backend needs all tensors on one CUDA device, got {devices}")
