"""Innovation and running top-k on the GPU: one kernel each.

    e_t = mean_d (y_t - sum_{j=1..taps} w_j y_{t-j})^2
    M_i = the k positions t < i chunk with the largest e_t

The innovation reads y once. The selection gives every chunk its own block, which finds the k-th
largest score of everything before the chunk digit by digit (radix selection) and writes the kept
positions in order: no state is carried from chunk to chunk, so all chunks run at once. That reads
c l / 2 scores; where this is too many (memory per token over long sequences) the associative scan
of ``top_k.py``, which is device-agnostic, takes its place, as it does for float64 scores.

The kernels are in ``innovation.cu``; they are compiled when first used (``ops/_nvrtc.py``).
Selection is not differentiable; where a gradient of the innovation itself is asked for, its
backward pass recomputes the error by torch's own operations.

y (b, l, d); weights (taps,); past (b, taps, d); scores (b, l); index, valid (b, c, k).
"""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bmojo_core.ops import _nvrtc
from bmojo_core.ops.innovation.cpu import innovation_cpu
from bmojo_core.ops.innovation.top_k import running_top_k_parallel

TILE, ERROR_THREADS, SELECT_THREADS = 16, 128, 512  # as in the source
MOST_TAPS = 32
MOST_READS = 2**33  # scores that the selection may read in all
ELEMENT = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Params(ctypes.Structure):
    """Mirror of the kernels' ``struct Params``."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("y", "past", "weights", "scores", "error", "index")]
        + [("valid", ctypes.c_void_p), ("y_b", ctypes.c_longlong), ("y_l", ctypes.c_longlong)]
        + [(n, ctypes.c_int) for n in ("b", "l", "d", "k", "chunk", "chunks")]
    )


def _launch(
    kernel: str, blocks: int, threads: int, device: int, params: Params, y_type: str, taps: int,
    vector: int,
) -> None:  # fmt: skip
    defines = (("Y_T", y_type), ("TAPS", str(taps)), ("VECTOR", str(vector)))
    source = _nvrtc.read_source("_intrinsics.cu", "innovation/innovation.cu")
    module = _nvrtc.load(source, defines, device)
    module.launch(kernel, (blocks, 1, 1), threads, 0, params)


class _Innovation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, past):
        ctx.save_for_backward(y, weights, past)
        return _squared_error(y, weights, past)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, derror):
        y, weights, past = ctx.saved_tensors
        inputs = [None if x is None else x.detach().requires_grad_() for x in (y, weights, past)]
        with torch.enable_grad():
            error = innovation_cpu(*inputs)
        given = [x for x in inputs if x is not None]
        found = iter(torch.autograd.grad(error, given, derror))
        return tuple(None if x is None else next(found) for x in inputs)


def _squared_error(y: Tensor, weights: Tensor, past: Tensor | None) -> Tensor:
    (b, l, d), taps = y.shape, weights.shape[0]
    y = y if y.stride(-1) == 1 else y.contiguous()
    past = None if past is None else past.contiguous()
    weights = weights.to(torch.float32).contiguous()
    error = torch.empty(b, l, dtype=torch.float32, device=y.device)
    params = Params(b=b, l=l, d=d, y_b=y.stride(0), y_l=y.stride(1), y=y.data_ptr())
    params.past = None if past is None else past.data_ptr()
    params.weights, params.error = weights.data_ptr(), error.data_ptr()
    size = y.element_size()
    steps = [y.data_ptr(), y.stride(0) * size, y.stride(1) * size, d * size, params.past or 0]
    vector = 1 if any(step % 16 for step in steps) else 16 // size
    blocks = b * -(-l // TILE)
    _launch(
        "squared_error", blocks, ERROR_THREADS, y.device.index, params, ELEMENT[y.dtype], taps,
        vector,
    )  # fmt: skip
    return error


def innovation_gpu(
    y: Float[Tensor, "b l d"],
    weights: Float[Tensor, " taps"],
    past: Float[Tensor, "b taps d"] | None,
) -> Float[Tensor, "b l"]:
    """Innovation in one pass over y; see ``bmojo_core.ops.innovation``.

    Parameters
    ----------
    y : Tensor, (b, l, d)
        float32, bfloat16, float16, any strides along b and l. float64, and predictors of more
        than 32 taps, take torch's own operations.
    weights : Tensor, (taps,)
    past : Tensor, (b, taps, d), optional
        One of another type than y's takes torch's own operations, too.

    Returns
    -------
    (b, l)
        float32, or float64 for float64 y.

    Raises
    ------
    ValueError
        If y is not on a CUDA device.
    """
    _require_cuda(y)
    other = past is not None and past.dtype != y.dtype  # the kernel reads both as one type
    if y.dtype not in ELEMENT or weights.shape[0] > MOST_TAPS or other:
        return innovation_cpu(y, weights, past)
    return _Innovation.apply(y, weights, past)


def running_top_k_gpu(
    scores: Float[Tensor, "b l"], k: int, chunk: int
) -> tuple[Int[Tensor, "b c k"], Bool[Tensor, "b c k"]]:
    """Memory at the beginning of every chunk; see ``bmojo_core.ops.innovation``.

    Parameters
    ----------
    scores : Tensor, (b, l)
        Half-precision scores are widened, which is exact.
    k, chunk : int

    Returns
    -------
    index : (b, c, k) int64
    valid : (b, c, k) bool

    Raises
    ------
    ValueError
        If scores is not on a CUDA device.
    """
    _require_cuda(scores)
    b, l = scores.shape
    c = -(-l // chunk)
    if scores.dtype == torch.float64 or b * c * l > MOST_READS:
        return running_top_k_parallel(scores, k, chunk)
    index = torch.empty(b, c, k, dtype=torch.int64, device=scores.device)
    valid = torch.empty(b, c, k, dtype=torch.bool, device=scores.device)
    if k == 0:
        return index, valid
    scores = scores.detach().to(torch.float32).contiguous()
    params = Params(b=b, l=l, k=k, chunk=chunk, chunks=c, scores=scores.data_ptr())
    params.index, params.valid = index.data_ptr(), valid.data_ptr()
    _launch("select_largest", b * c, SELECT_THREADS, scores.device.index, params, "float", 1, 1)
    return index, valid


def _require_cuda(x: Tensor) -> None:
    if not x.is_cuda:
        raise ValueError(f"the gpu backend needs tensors on a CUDA device, got one on {x.device}")
