"""Causal depthwise convolution with SiLU on the GPU: one kernel forward, one backward.

    y_t = act( sum_{j=1..k} weight_j x_{t-k+j} + bias )

Every input is read once and every output written once, so the time is that of the bytes. The
gradients of ``weight`` and ``bias`` are summed tile by tile in a fixed order: two runs give the
same bits. The kernels are in ``conv.cu``; they are compiled when first used (``ops/_nvrtc.py``).

x (b, l, d); weight (d, k); bias (d,); initial_state (b, k-1, d): the k-1 inputs before x.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _nvrtc

THREADS = 128
WIDTH = 8  # bytes; wider rows leave too few registers to wait for memory with
MOST_TAPS = 32
FULL_CHIP = 128 * 1024  # threads that hide the latency of memory
ELEMENT = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}

_POINTERS = (*("x", "initial", "dy", "weight", "bias", "y", "dx", "dinitial", "partial"),)
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
class _Call:
    b: int
    l: int
    d: int
    taps: int
    silu: bool
    dtype: torch.dtype
    device: torch.device
    tile: int

    @property
    def tiles(self) -> int:
        return -(-self.l // self.tile)

    def launch(self, kernel: str, tensors: dict[str, Tensor | None]) -> None:
        vector = _vector(self.d, tensors)
        params = Params(b=self.b, l=self.l, d=self.d, tile=self.tile, tiles=self.tiles)
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
        source = _nvrtc.read_source("_intrinsics.cu", "causal_conv/conv.cu")
        module = _nvrtc.load(source, defines, self.device.index)
        threads = self.b * self.tiles * (self.d // vector)
        module.launch(kernel, (-(-threads // THREADS), 1, 1), THREADS, 0, params)


def _vector(d: int, tensors: dict[str, Tensor | None]) -> int:
    """Channels a thread moves at once: eight bytes if every row of every tensor allows it."""
    for name, x in tensors.items():
        if x is None or name in ("weight", "bias", "partial"):
            continue
        size = x.element_size()
        steps = (x.data_ptr(), x.stride(0) * size, x.stride(1) * size, d * size)
        if any(step % WIDTH for step in steps):
            return 1
    return WIDTH // tensors["x"].element_size()


def _tile(b: int, l: int, d: int, element_size: int) -> int:
    """Steps a thread walks: long enough to share little, short enough to fill the chip."""
    tile = 128
    while tile > 16 and b * -(-l // tile) * d * element_size // WIDTH < FULL_CHIP:
        tile //= 2
    return tile


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial, silu):
        (b, l, d), k = x.shape, weight.shape[1]
        tile = _tile(b, l, d, x.element_size())
        call = _Call(b, l, d, k, silu, x.dtype, x.device, tile)
        x = _rows(x)
        start = None if initial is None else initial.detach().to(x.dtype).contiguous()
        y = torch.empty(b, l, d, dtype=x.dtype, device=x.device)
        tensors = dict(x=x, weight=_float(weight), bias=_float(bias), initial=start)
        call.launch("conv_forward", tensors | dict(y=y))
        ctx.call = call
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias, initial)]
        ctx.save_for_backward(*tensors.values())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        call = ctx.call
        tensors = dict(zip(("x", "weight", "bias", "initial"), ctx.saved_tensors))
        x, initial = tensors["x"], tensors["initial"]
        shape = (call.b * call.tiles, call.d, call.taps + 1)
        gradients = dict(
            dy=_rows(dy),
            dx=torch.empty(call.b, call.l, call.d, dtype=x.dtype, device=x.device),
            dinitial=None if initial is None else torch.empty_like(initial),
            partial=torch.empty(shape, device=x.device),
        )
        call.launch("conv_backward", tensors | gradients)
        total = gradients["partial"].sum(0)
        weight_type, bias_type, initial_type = ctx.dtypes
        dweight = total[:, : call.taps].to(weight_type)
        dbias = None if bias_type is None else total[:, call.taps].to(bias_type)
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
