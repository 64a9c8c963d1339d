"""Window-and-memory attention with every score written down: short, dense, quadratic.

    out_i = sum_{j in V_i} softmax_{V_i}(scale q_i.k_j) v_j
    V_i   = { j : i + r - w < j <= i + r, key_valid_j }  +  valid memory tokens of chunk i // chunk

q (b, l, h, p); k, v (b, r+l, g, p); mem_k, mem_v (b, c, m, g, p); mem_valid (b, c, m).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype, outside_autocast


@outside_autocast
def memory_attention_reference(
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
    """Attention over the (l, r+l+m) table of scores; see ``bmojo_core.ops.memory_attention``."""
    dtype = compute_dtype(q)
    b, l, h, _ = q.shape
    repeats = h // k.shape[2]

    def every_query(x: Tensor) -> Tensor:  # (b, j, g, p) -> (b, l, j, h, p)
        return x.to(dtype).repeat_interleave(repeats, dim=-2)[:, None].expand(b, l, -1, -1, -1)

    keys, values = every_query(k), every_query(v)
    visible = window_visible(l, k.shape[1], window, q.device).expand(b, -1, -1)
    if key_valid is not None:
        visible = visible & key_valid[:, None, :]
    if mem_k is not None:
        chunk_of = torch.arange(l, device=q.device) // chunk
        if mem_valid is None:
            mem_valid = torch.ones(mem_k.shape[:3], dtype=torch.bool, device=q.device)
        own_k, own_v = (
            x.to(dtype).repeat_interleave(repeats, dim=-2)[:, chunk_of] for x in (mem_k, mem_v)
        )
        keys, values = torch.cat([keys, own_k], dim=2), torch.cat([values, own_v], dim=2)
        visible = torch.cat([visible, mem_valid[:, chunk_of]], dim=2)

    scores = scale * torch.einsum("blhp,bljhp->blhj", q.to(dtype), keys)
    visible = visible[:, :, None, :]
    # where nothing is visible every score is set to 0, not -inf: the softmax and its gradient
    # stay finite, and the weights are then replaced by 0
    scores = torch.where(visible, scores, torch.where(visible.any(-1, True), -torch.inf, 0.0))
    weights = torch.where(visible, scores.softmax(dim=-1), 0.0)
    return torch.einsum("blhj,bljhp->blhp", weights, values).to(q.dtype)


def window_visible(
    l: int, length: int, window: int | None, device: torch.device
) -> Bool[Tensor, "1 l rl"]:
    """visible[i, j] = i + r - window < j <= i + r, with r = length - l carried keys."""
    last = torch.arange(length - l, length, device=device)[:, None]
    j = torch.arange(length, device=device)
    visible = j <= last
    if window is not None:
        visible = visible & (j > last - window)
    return visible[None]
