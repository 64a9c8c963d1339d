"""The gradient of reading memory on the GPU: one Triton kernel without atomics.

A token enters memory once, stays for a run of chunks and is then given up for good. The program of
its first chunk walks along the run, adds the gradients up in float32, and adds the sum to the
token's row; the programs of its later chunks see that it was there before and end. Every row is
written once, in a fixed order.

Names: entry = (b N + n) K + i, one remembered token of one chunk; W numbers a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WIDEST = 2048  # numbers of a row a program takes


@triton.jit
def _place(token, index_, valid_, chunk, exists, K, K_PAD: tl.constexpr):
    """Where a chunk's memory holds the token; -1 where it does not."""
    i = tl.arange(0, K_PAD)
    inside = (i < K) & exists
    held = tl.load(index_ + chunk * K + i, mask=inside, other=-1)
    known = tl.load(valid_ + chunk * K + i, mask=inside, other=0) != 0
    return tl.max(tl.where((held == token) & known, i, -1)).to(tl.int64)


@triton.jit
def add_runs(
    gk_, gv_, dk_, dv_, index_, valid_, dk_b, dk_n, dk_i, dv_b, dv_n, dv_i, L, N, K,
    W: tl.constexpr, BLOCK: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """g[token] += sum of dtaken over the run of chunks that begins with this entry's."""
    entry = tl.program_id(0).to(tl.int64)
    chunk, place = entry // K, entry % K
    b, n = chunk // N, chunk % N
    token = tl.load(index_ + entry)
    if tl.load(valid_ + entry) == 0:
        return
    if _place(token, index_, valid_, chunk - 1, n > 0, K, K_PAD) >= 0:
        return
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = w < W
    at = (b * L + token) * W + w
    dk = tl.load(gk_ + at, mask=inside, other=0.0).to(tl.float32)
    dv = tl.load(gv_ + at, mask=inside, other=0.0).to(tl.float32)
    while place >= 0:
        from_k = dk_ + b * dk_b + n * dk_n + place * dk_i + w
        from_v = dv_ + b * dv_b + n * dv_n + place * dv_i + w
        dk += tl.load(from_k, mask=inside, other=0.0).to(tl.float32)
        dv += tl.load(from_v, mask=inside, other=0.0).to(tl.float32)
        n += 1
        place = _place(token, index_, valid_, b * N + n, n < N, K, K_PAD)
    tl.store(gk_ + at, dk.to(gk_.dtype.element_ty), mask=inside)
    tl.store(gv_ + at, dv.to(gv_.dtype.element_ty), mask=inside)


def add_taken_gpu(
    g: tuple[Tensor, Tensor], dtaken: tuple[Tensor, Tensor], index: Tensor, valid: Tensor
) -> None:
    """See ``add_taken`` of ``bmojo_core.ops.memory_gather``."""
    (b, n, k), length = index.shape, g[0].shape[1]
    if index.numel() == 0:
        return
    gk, gv = (x.flatten(2) for x in g)
    dk, dv = (_rows(x) for x in dtaken)
    width = gk.shape[-1]
    block = min(WIDEST, triton.next_power_of_2(width))
    sizes = dict(W=width, BLOCK=block, K_PAD=max(16, triton.next_power_of_2(k)))
    add_runs[(b * n * k, triton.cdiv(width, block))](
        *(gk, gv, dk, dv, index.contiguous(), valid.contiguous()),
        *(*dk.stride()[:3], *dv.stride()[:3], length, n, k),
        **sizes,
    )


def _rows(x: Tensor) -> Tensor:
    """(b, n, m, W) whose last axis is contiguous: a part of a wider memory stays a view."""
    x = x.flatten(3)
    return x if x.stride(-1) == 1 else x.contiguous()
