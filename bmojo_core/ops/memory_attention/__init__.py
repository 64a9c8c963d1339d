r"""Attention over a sliding window and over memory tokens, in one softmax.

    out_i = sum_{j in V_i} a_ij v_j,    a_ij = softmax over j in V_i of scale q_i.k_j
    V_i   = { j : i + r - w < j <= i + r, key_valid_j }  +  valid memory tokens of chunk i // chunk

Symbols
-------
q            (b, l, h, p)      queries: h heads of width p
k, v         (b, r+l, g, p)    keys and values: g key heads, each shared by h / g query heads;
                               the first r were carried over from before the queries
mem_k, mem_v (b, c, m, g, p)   memory tokens of every chunk, eidetic and fading; c = ceil(l / chunk)
w            window            inputs a query sees, its own included
chunk                          queries that share one memory (1: every query has its own)

Source: B'MOJO (arXiv 2407.06324), Algorithm 1 step 5 (chunk 1) and appendix B.2 (chunks).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bmojo_core.ops._checks import check_backend, check_rank
from bmojo_core.ops.memory_attention.reference import memory_attention_reference

__all__ = ["memory_attention"]

BACKENDS = ("auto", "reference", "cpu", "gpu", "flash_attn")


def memory_attention(
    q: Float[Tensor, "b l h p"],
    k: Float[Tensor, "b rl g p"],
    v: Float[Tensor, "b rl g p"],
    mem_k: Float[Tensor, "b c m g p"] | None = None,
    mem_v: Float[Tensor, "b c m g p"] | None = None,
    mem_valid: Bool[Tensor, "b c m"] | None = None,
    *,
    window: int | None,
    chunk: int | None = None,
    key_valid: Bool[Tensor, "b rl"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b l h p"]:
    """Joint softmax attention of every query over its window and its chunk's memory.

    Parameters
    ----------
    q : (b, l, h, p)
        Queries; b and l at least 1, h a multiple of g.
    k, v : (b, r + l, g, p)
        Keys and values. With r carried ones in front, query i stands at key i + r.
    mem_k, mem_v : (b, c, m, g, p), optional
        Memory tokens of each chunk, c = ceil(l / chunk). Both or none; m may be 0.
    mem_valid : (b, c, m) bool, optional
        Which memory slots hold a token. Default: all.
    window : int or None
        Keys a query sees, its own included, at least 1. None: all keys up to its own.
    chunk : int, optional
        Queries that share one memory, at least 1; needed with mem_k.
    key_valid : (b, r + l) bool, optional
        False hides a key (padding) from every query. Default: all True.
    scale : float, optional
        Factor on q.k. Default: p ** -0.5.
    backend : "auto", "reference", "cpu", "gpu" or "flash_attn"
        "auto" takes "gpu" for CUDA tensors, else "cpu". "flash_attn" has plain sliding or causal
        attention only: no memory tokens, no key_valid.

    Returns
    -------
    (b, l, h, p)
        In q's dtype. A query that sees nothing gets exactly 0, and zero gradients.

    Raises
    ------
    ValueError
        Wrong shape, dtype or device, empty batch or sequence, window < 1, chunk < 1, h not a
        multiple of g, unknown backend, or a request that the backend cannot serve.

    Notes
    -----
    Time and memory grow linearly with l for a finite window. Half-precision inputs are
    accumulated in float32. NaN is not looked for.
    """
    _check_inputs(q, k, v, key_valid)
    _check_sizes(window, chunk)
    _check_memory(q, k, mem_k, mem_v, mem_valid, chunk)
    check_backend(backend, BACKENDS, q.device)
    if mem_k is not None and mem_k.shape[2] == 0:
        mem_k = mem_v = mem_valid = None
    if scale is None:
        scale = q.shape[-1] ** -0.5
    attend = _backend(backend, q)
    return attend(q, k, v, mem_k, mem_v, mem_valid, window, chunk, key_valid, scale)


def _backend(backend: str, q: Tensor):
    if backend == "reference":
        return memory_attention_reference
    if backend == "flash_attn":
        from bmojo_core.ops.memory_attention.flash import memory_attention_flash

        return memory_attention_flash
    if backend == "gpu" or (backend == "auto" and q.is_cuda):
        from bmojo_core.ops.memory_attention.gpu import memory_attention_gpu

        return memory_attention_gpu
    from bmojo_core.ops.memory_attention.cpu import memory_attention_cpu

    return memory_attention_cpu


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> None:
    b, l, h, p = check_rank("q", q, "b l h p")
    _, length, g, _ = check_rank("k", k, "b r+l g p")
    check_rank("v", v, "b r+l g p")
    _check_like("k", k, q)
    _check_like("v", v, q)
    if k.shape[0] != b or k.shape[3] != p:
        raise ValueError(f"k must have shape ({b}, r + {l}, g, {p}); got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}; got {tuple(v.shape)}")
    if length < l:
        raise ValueError(f"k must hold at least as many keys as q has queries, {l}; got {length}")
    if h % g != 0:
        raise ValueError(f"h must be a multiple of g; got h = {h} query heads, g = {g} key heads")
    if key_valid is not None:
        _check_mask("key_valid", key_valid, (b, length), q)


def _check_memory(
    q: Tensor,
    k: Tensor,
    mem_k: Tensor | None,
    mem_v: Tensor | None,
    mem_valid: Tensor | None,
    chunk: int | None,
) -> None:
    if mem_k is None or mem_v is None:
        if not (mem_k is None and mem_v is None and mem_valid is None):
            raise ValueError("mem_k and mem_v must be given together, and mem_valid only with them")
        return
    if chunk is None:
        raise ValueError("chunk must be given with mem_k; got None")
    b, l, _, p = q.shape
    g = k.shape[2]
    c = -(-l // chunk)
    if mem_k.ndim != 5 or mem_k.shape[:2] != (b, c) or mem_k.shape[3:] != (g, p):
        raise ValueError(
            f"mem_k must have shape ({b}, {c}, m, {g}, {p}), c = ceil(l / chunk); "
            f"got {tuple(mem_k.shape)}"
        )
    if mem_v.shape != mem_k.shape:
        raise ValueError(
            f"mem_v must have mem_k's shape {tuple(mem_k.shape)}; got {tuple(mem_v.shape)}"
        )
    _check_like("mem_k", mem_k, q)
    _check_like("mem_v", mem_v, q)
    if mem_valid is not None:
        _check_mask("mem_valid", mem_valid, tuple(mem_k.shape[:3]), q)


def _check_sizes(window: int | None, chunk: int | None) -> None:
    for name, size in (("window", window), ("chunk", chunk)):
        if size is None:
            continue
        integer = isinstance(size, int | torch.SymInt) and not isinstance(size, bool)
        if not integer or size < 1:
            raise ValueError(f"{name} must be None or an integer >= 1; got {size!r}")


def _check_like(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise ValueError(f"{name} must have q's dtype {q.dtype}; got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}; got {x.device}")


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool; got {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}; got {mask.device}")
