r"""Window-and-memory attention on the GPU: one pass, one softmax, nothing of size l x l.

    out_i = sum_{j in V_i} exp(scale q_i.k_j - s_i) v_j,      s_i = log sum_{V_i} exp(scale q_i.k_j)
    V_i   = { j : i + r - w < j <= i + r, key_valid_j }  +  valid memory tokens of chunk i // chunk

A block of queries that lies inside one chunk walks over the keys of its window and then over the
chunk's memory tokens, keeping a running maximum and sum: the memory is simply a second stretch of
keys with another mask. The backward pass rebuilds the weights from ``s`` and writes each gradient
once, from the block that owns it (no atomics: two runs give the same bits):

    D_i  = dout_i . out_i            dS_ij = P_ij (dout_i . v_j - D_i)
    dq_i = scale sum_j dS_ij k_j     dk_j = scale sum_i dS_ij q_i     dv_j = sum_i P_ij dout_i

The kernels are in ``kernels.py``. Three requests take torch's own operations instead, on the same
device and through the same definitions, because there is nothing in them for a kernel to win:
full causal attention without memory or padding (torch's flash attention), chunks shorter than 16
queries (memory per token: ``attend_tables`` of ``cpu.py``, which is device-agnostic), and float64
or heads wider than 256.

q (b, l, h, p); k, v (b, r+l, g, p); mem_k, mem_v (b, c, m, g, p); mem_valid (b, c, m).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from jaxtyping import Bool, Float
from torch import Tensor

from bmojo_core.ops._checks import outside_autocast
from bmojo_core.ops.memory_attention import kernels
from bmojo_core.ops.memory_attention.cpu import attend_causal, memory_attention_cpu

SHORTEST_CHUNK = 16  # queries; matrix units take rows by sixteen
WIDEST_HEAD = 256
MOST_PROGRAMS = 65535  # along the second and the third axis of a grid
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of one kernel: rows it owns, columns it walks over, warps, pipeline depth."""

    rows: int
    columns: int
    warps: int
    stages: int


@outside_autocast
def memory_attention_gpu(
    q: Float[Tensor, "b l h p"],
    k: Float[Tensor, "b rl g p"],
    v: Float[Tensor, "b rl g p"],
    mem_k: Float[Tensor, "b c m g p"] | None,
    mem_v: Float[Tensor, "b c m g p"] | None,
    mem_valid: Bool[Tensor, "b c m"] | None,
    window: int | None,
    chunk: int | None,
    key_valid: Bool[Tensor, "b rl"] | None,
    scale: float,
) -> Float[Tensor, "b l h p"]:
    """Joint softmax attention over window and memory; see ``bmojo_core.ops.memory_attention``.

    Parameters
    ----------
    q, k, v, mem_k, mem_v : Tensor
        float32, bfloat16 or float16 of one type, any strides but the last; differentiable.
    mem_valid, key_valid : bool Tensor, optional
    window, chunk : int or None
    scale : float

    Returns
    -------
    (b, l, h, p)
        In q's dtype; 0 where a query sees nothing.

    Raises
    ------
    ValueError
        If q is not on a CUDA device, or there are more than 65535 rows.
    """
    _require_cuda(q)
    causal = window is None or window >= k.shape[1]
    if mem_k is None and causal and key_valid is None and q.shape[1] == k.shape[1]:
        return attend_causal(q, k, v, None, scale)
    short = mem_k is not None and chunk < SHORTEST_CHUNK
    if short or q.dtype == torch.float64 or q.shape[-1] > WIDEST_HEAD:
        memory = (mem_k, mem_v, mem_valid)
        return memory_attention_cpu(q, k, v, *memory, window, chunk, key_valid, scale)
    if q.shape[0] > MOST_PROGRAMS:
        raise ValueError(f"q has b={q.shape[0]} rows; the gpu backend takes {MOST_PROGRAMS}")
    window = k.shape[1] if causal else window
    chunk = q.shape[1] if mem_k is None else chunk
    arguments = (q, k, v, mem_k, mem_v, mem_valid, key_valid, window, chunk, scale)
    with torch.cuda.device_of(q):  # Triton launches where the current device is
        return _MemoryAttention.apply(*arguments)


def _require_cuda(q: Tensor) -> None:
    if not q.is_cuda:
        raise ValueError(f"the gpu backend needs tensors on a CUDA device; q is on {q.device}")


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mem_k, mem_v, mem_valid, key_valid, window, chunk, scale):
        q, k, v, mem_k, mem_v = (_unit_stride(x) for x in (q, k, v, mem_k, mem_v))
        mem_valid, key_valid = (_dense(x) for x in (mem_valid, key_valid))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        logsum = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device)
        tensors = (q, k, v, mem_k, mem_v, mem_valid, key_valid)
        job = _Job.of(*tensors, window, chunk, scale)
        _launch_forward(job, *tensors, out, logsum)
        ctx.save_for_backward(*tensors, out, logsum)
        ctx.job = job
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        *tensors, out, logsum = ctx.saved_tensors
        q, k, v, mem_k, mem_v, _, _ = tensors
        dout = _unit_stride(dout)
        dot = torch.empty_like(logsum)
        dq, dk, dv, dmem_k, dmem_v = (
            None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x in (q, k, v, mem_k, mem_v)
        )
        _launch_queries(ctx.job, *tensors, dout, out, logsum, dot, dq)  # and dot, for the others
        _launch_keys(ctx.job, *tensors, dout, logsum, dot, dk, dv)
        if mem_k is not None:
            _launch_memory(ctx.job, *tensors, dout, logsum, dot, dmem_k, dmem_v)
        return dq, dk, dv, dmem_k, dmem_v, None, None, None, None, None


@dataclass(frozen=True)
class _Job:
    """Sizes of one call and what the kernels are specialised for."""

    b: int
    l: int
    h: int
    p: int
    length: int
    g: int
    c: int
    m: int
    window: int
    chunk: int
    scale: float
    wide: bool  # float32: products in three tf32 passes
    has_valid: bool
    has_mem_valid: bool

    @staticmethod
    def of(q, k, v, mem_k, mem_v, mem_valid, key_valid, window, chunk, scale) -> _Job:
        (b, l, h, p), (_, length, g, _) = q.shape, k.shape
        c, m = (1, 0) if mem_k is None else mem_k.shape[1:3]
        wide = q.dtype == torch.float32
        valid = key_valid is not None, mem_valid is not None
        return _Job(b, l, h, p, length, g, c, m, window, chunk, scale, wide, *valid)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.l, self.length, self.m, self.window, self.chunk

    def constants(self, blocks: Blocks) -> dict[str, int | bool | str]:
        return dict(
            H=self.h,
            G=self.g,
            P=self.p,
            P_PAD=max(16, triton.next_power_of_2(self.p)),
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            PRECISION="tf32x3" if self.wide else "tf32",
            HAS_VALID=self.has_valid,
            HAS_MEM=self.m > 0,
            HAS_MEM_VALID=self.has_mem_valid,
            TAIL=max(16, triton.next_power_of_2(self.m % blocks.columns)),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    def blocks(self, rows: int, columns: int, warps: int, stages: int, per: int) -> Blocks:
        """Tiles no longer than what there is: ``per`` rows at most, a window of columns."""
        if self.wide:
            rows, columns, stages = min(rows, 64), min(columns, 32), min(stages, 2)
        if self.p > 128:
            rows, columns = min(rows, 32 if self.wide else 64), min(columns, 32)
            stages = 1 if self.wide else stages
        rows = min(rows, max(16, triton.next_power_of_2(per)))
        columns = min(columns, max(16, triton.next_power_of_2(self.window + rows)))
        return Blocks(rows, columns, warps if rows * self.p > 2048 else 4, stages)


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _dense(mask: Tensor | None) -> Tensor | None:
    """A mask that the kernels can index without strides: one shared by all rows is copied."""
    return None if mask is None else mask.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    """All strides but the last of each tensor; zeros stand for a tensor that is not there."""
    found = []
    for x, count in zip(tensors[0::2], tensors[1::2]):
        found += [0] * count if x is None else x.stride()[:count]
    return found


def _pointers(job: _Job, k: Tensor, v: Tensor, mem_k, mem_v) -> tuple[Tensor, Tensor]:
    """Memory keys and values; without memory (m = 0) something to point at, which is never read."""
    return (k, v) if job.m == 0 else (mem_k, mem_v)


def _launch_forward(job: _Job, q, k, v, mem_k, mem_v, mem_valid, key_valid, out, logsum) -> None:
    blocks = job.blocks(64 if job.p > 64 else 128, 64, 4, 3, min(job.chunk, job.l))
    per_chunk = -(-min(job.chunk, job.l) // blocks.rows)
    strides = _strides(q, 3, k, 3, v, 3, mem_k, 4, mem_v, 4, out, 3)
    pointers = (q, k, v, *_pointers(job, k, v, mem_k, mem_v), mem_valid, key_valid, out, logsum)
    kernels.forward[(job.c * per_chunk, job.h, job.b)](
        *pointers, *strides, *job.sizes, per_chunk, job.scale * LOG2_E, **job.constants(blocks)
    )


def _launch_queries(
    job: _Job, q, k, v, mem_k, mem_v, mem_valid, key_valid, dout, out, logsum, dot, dq
) -> None:
    blocks = job.blocks(64 if job.p > 64 else 128, 64, 4, 2, min(job.chunk, job.l))
    per_chunk = -(-min(job.chunk, job.l) // blocks.rows)
    strides = _strides(q, 3, k, 3, v, 3, mem_k, 4, mem_v, 4, dout, 3, out, 3, dq, 3)
    memory = _pointers(job, k, v, mem_k, mem_v)
    pointers = (q, k, v, *memory, mem_valid, key_valid, dout, out, logsum, dot, dq)
    kernels.query_gradients[(job.c * per_chunk, job.h, job.b)](
        *pointers,
        *strides,
        *job.sizes,
        *(per_chunk, job.scale * LOG2_E, job.scale),
        **job.constants(blocks),
    )


def _launch_keys(
    job: _Job, q, k, v, mem_k, mem_v, mem_valid, key_valid, dout, logsum, dot, dk, dv
) -> None:
    # keys that many heads share are walked over longer: fewer, larger tiles
    shared = job.h >= 4 * job.g and job.p <= 128 and not job.wide
    blocks = job.blocks(*((128, 64, 8, 2) if shared else (64, 64, 4, 2)), job.length)
    strides = _strides(q, 3, k, 3, v, 3, dout, 3, dk, 3)
    pointers = (q, k, v, key_valid, dout, logsum, dot, dk, dv)
    kernels.key_gradients[(-(-job.length // blocks.rows), job.g, job.b)](
        *pointers,
        *strides,
        *job.sizes,
        *(job.scale * LOG2_E, job.scale),
        **job.constants(blocks),
    )


def _launch_memory(
    job: _Job, q, k, v, mem_k, mem_v, mem_valid, key_valid, dout, logsum, dot, dmem_k, dmem_v
) -> None:
    few = job.m <= 128 and job.p <= 128 and not job.wide
    blocks = job.blocks(*((64, 32, 4, 3) if few else (64, 64, 4, 2)), job.m)
    per_chunk = -(-job.m // blocks.rows)
    strides = _strides(q, 3, mem_k, 4, mem_v, 4, dout, 3, dmem_k, 4)
    pointers = (q, mem_k, mem_v, mem_valid, dout, logsum, dot, dmem_k, dmem_v)
    kernels.memory_gradients[(job.c * per_chunk, job.g, job.b)](
        *pointers,
        *strides,
        *job.sizes,
        *(per_chunk, job.scale * LOG2_E, job.scale),
        **job.constants(blocks),
    )
