"""Window-and-memory attention in blocks: cost linear in l, on any device that runs torch.

    out_i = sum_{j in V_i} softmax_{V_i}(scale q_i.k_j) v_j
    V_i   = { j : i + r - w < j <= i + r, key_valid_j }  +  valid memory tokens of chunk i // chunk

A block of t consecutive queries sees s = t + w - 1 consecutive keys, so the window's scores are
l / t small (t, s) tables; the memory's are c tables (chunk, m). Both are laid side by side and
share one softmax.

q (b, l, h, p); k, v (b, r+l, g, p); mem_k, mem_v (b, c, m, g, p); x = h / g query heads a key head;
n = ceil(l / t) blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def memory_attention_cpu(
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
    """Blockwise attention; see ``bmojo_core.ops.memory_attention``."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    b, l, h, p = q.shape
    g, length = k.shape[2], k.shape[1]
    queries = scale * q.to(dtype).view(b, l, g, h // g, p)
    window = length if window is None else min(window, length)
    block = min(l, max(16, window))
    keys, values = (_spans(x.to(dtype), l, window, block) for x in (k, v))
    scores = _flatten(torch.einsum("bntgxp,bngps->bntgxs", _blocks(queries, block), keys), l)
    visible = _window_visible(b, l, length, window, block, key_valid, q.device)
    if mem_k is not None:
        tables = torch.einsum("bntgxp,bnmgp->bntgxm", _blocks(queries, chunk), mem_k.to(dtype))
        scores = torch.cat([scores, _flatten(tables, l)], dim=-1)
        if mem_valid is None:
            mem_valid = torch.ones(mem_k.shape[:3], dtype=torch.bool, device=q.device)
        visible = torch.cat([visible, mem_valid.repeat_interleave(chunk, dim=1)[:, :l]], dim=-1)
    weights = _masked_softmax(scores, visible[:, :, None, None])
    near = _blocks(weights[..., : keys.shape[-1]], block)
    out = _flatten(torch.einsum("bntgxs,bngps->bntgxp", near, values), l)
    if mem_k is not None:
        far = _blocks(weights[..., keys.shape[-1] :], chunk)
        out = out + _flatten(torch.einsum("bntgxm,bnmgp->bntgxp", far, mem_v.to(dtype)), l)
    return out.reshape(b, l, h, p).to(q.dtype)


def _blocks(x: Tensor, size: int) -> Tensor:
    """(b, l, ...) -> (b, n, size, ...), the last block filled with zeros."""
    n = -(-x.shape[1] // size)
    padding = [0, 0] * (x.ndim - 2) + [0, n * size - x.shape[1]]
    return F.pad(x, padding).unflatten(1, (n, size))


def _flatten(x: Tensor, l: int) -> Tensor:
    """(b, n, size, ...) -> (b, l, ...): undo ``_blocks``."""
    return x.flatten(1, 2)[:, :l]


def _spans(x: Tensor, l: int, window: int, block: int) -> Tensor:
    """(b, r+l, ...) -> (b, n, ..., block + window - 1): the keys that each block's queries see."""
    n = -(-l // block)
    front = window - 1 - (x.shape[1] - l)
    padding = [0, 0] * (x.ndim - 2) + [front, n * block - l]
    return F.pad(x, padding).unfold(1, block + window - 1, block)


def _window_visible(
    b: int,
    l: int,
    length: int,
    window: int,
    block: int,
    key_valid: Tensor | None,
    device: torch.device,
) -> Bool[Tensor, "b l s"]:
    """Which keys of its block's span each query sees: a band, and no padding."""
    ahead = (
        torch.arange(block + window - 1, device=device)
        - torch.arange(block, device=device)[:, None]
    )
    band = (ahead >= 0) & (ahead < window)
    if key_valid is None:
        key_valid = torch.ones(1, length, dtype=torch.bool, device=device)
    span = _spans(key_valid, l, window, block)
    return _flatten(band & span[:, :, None, :], l).expand(b, -1, -1)


def _masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over visible entries; a row without any is 0 and has zero gradient."""
    scores = torch.where(visible, scores, torch.where(visible.any(-1, True), -torch.inf, 0.0))
    return torch.where(visible, scores.softmax(dim=-1), 0.0)
