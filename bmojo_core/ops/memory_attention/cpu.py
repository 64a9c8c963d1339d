"""Window-and-memory attention in blocks: cost linear in l, in plain torch.

    out_i = sum_{j in V_i} softmax_{V_i}(scale q_i.k_j) v_j
    V_i   = { j : i + r - w < j <= i + r, key_valid_j }  +  valid memory tokens of chunk i // chunk

A block of t consecutive queries sees a span of s >= t + w - 1 consecutive keys. Three ways to sum:

attend_causal   no window: torch's own causal attention
attend_blocks   a block lies inside one chunk: [memory | span] is one list of m + s keys, and all
                blocks go through torch's fused attention, whose tables (t, m + s) never leave cache
attend_tables   chunks shorter than a block (token by token: chunk = 1): the window's scores are
                tables (t, s), the memory's are tables (chunk, m); side by side they share a softmax

q (b, l, h, p); k, v (b, r+l, g, p); mem_k, mem_v (b, c, m, g, p); mem_valid (b, c, m);
x = h / g query heads share a key head; n blocks of t queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype, outside_autocast

SMALLEST_BLOCK = 64  # queries; shorter blocks pay more for copying their span than they save
SPAN_MULTIPLE = 16  # keys
LARGEST_BLOCK = 256  # longer ones compute ever more scores outside the window
SHORTEST_FUSED_CHUNK = 8  # below, the copies of the window in every chunk's list dominate


@outside_autocast
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
    dtype = compute_dtype(q)
    l, length = q.shape[1], k.shape[1]
    window = length if window is None else min(window, length)
    queries, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
    if mem_k is None:
        if window == length:
            return attend_causal(queries, keys, values, key_valid, scale).to(q.dtype)
        mem_k = mem_v = keys.new_zeros(keys.shape[0], 1, 0, *keys.shape[2:])
        chunk = l
    mem_k, mem_v = mem_k.to(dtype), mem_v.to(dtype)
    if mem_valid is None:
        mem_valid = torch.ones(mem_k.shape[:3], dtype=torch.bool, device=q.device)
    block = block_size(l, window, chunk)
    attend = attend_blocks if chunk % block == 0 or chunk >= l else attend_tables
    memory = (mem_k, mem_v, mem_valid)
    out = attend(queries, keys, values, *memory, window, chunk, key_valid, scale, block)
    return out.to(q.dtype)


def block_size(l: int, window: int, chunk: int) -> int:
    """Queries a block: about a window's worth, dividing the chunk where that is possible."""
    wanted = max(SMALLEST_BLOCK, min(window, LARGEST_BLOCK))
    if chunk >= l:
        return min(l, wanted)  # a single chunk may be cut anywhere
    if chunk < SHORTEST_FUSED_CHUNK:
        return wanted
    pieces = -(-chunk // wanted)
    while chunk % pieces and chunk > SHORTEST_FUSED_CHUNK * pieces:
        pieces += 1
    return chunk // pieces if chunk % pieces == 0 else wanted


def attend_causal(
    q: Float[Tensor, "b l h p"],
    k: Float[Tensor, "b rl g p"],
    v: Float[Tensor, "b rl g p"],
    key_valid: Bool[Tensor, "b rl"] | None,
    scale: float,
) -> Float[Tensor, "b l h p"]:
    """Every query sees all valid keys up to its own."""
    l, h, length, g = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if key_valid is None and l == length:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=h != g
        ).transpose(1, 2)
    visible = torch.ones(l, length, dtype=torch.bool, device=q.device).tril(length - l)[None, None]
    if key_valid is not None:
        visible = visible & key_valid[:, None, None, :]
    out = _fused_attention(q, k, v, visible, scale, some_blind=key_valid is not None)
    return out.transpose(1, 2)


def attend_blocks(
    q: Float[Tensor, "b l h p"],
    k: Float[Tensor, "b rl g p"],
    v: Float[Tensor, "b rl g p"],
    mem_k: Float[Tensor, "b c m g p"],
    mem_v: Float[Tensor, "b c m g p"],
    mem_valid: Bool[Tensor, "b c m"],
    window: int,
    chunk: int,
    key_valid: Bool[Tensor, "b rl"] | None,
    scale: float,
    block: int,
) -> Float[Tensor, "b l h p"]:
    """Each block of a chunk attends to [memory of the chunk | span of the block] at once."""
    b, l, h, p = q.shape
    g, n = k.shape[2], -(-l // block)
    x = h // g

    def listed(memory: Tensor, near: Tensor) -> Tensor:  # -> (b n, g, m + s, p)
        pieces = [_own_memory(memory, n, block, chunk), *_span_pieces(near, l, window, block)]
        return torch.cat(pieces, dim=2).flatten(0, 1).transpose(1, 2)

    far = _own_memory(mem_valid, n, block, chunk)[:, :, None].expand(b, n, block, -1)
    near = _window_visible(l, k.shape[1], window, block, key_valid, q.device)
    visible = torch.cat([far, near.expand(b, -1, -1, -1)], dim=3).flatten(0, 1)[:, None]
    # heads that share keys stand below each other as further queries: (b n, g, x t, p)
    rows = _blocks(q, block).unflatten(3, (g, x)).permute(0, 1, 3, 4, 2, 5)
    out = _fused_attention(
        rows.reshape(b * n, g, x * block, p),
        listed(mem_k, k),
        listed(mem_v, v),
        visible.repeat(1, 1, x, 1) if x > 1 else visible,
        scale,
        some_blind=key_valid is not None,
    )
    out = out.view(b, n, g, x, block, p).permute(0, 1, 4, 2, 3, 5)
    return _flatten(out.reshape(b, n, block, h, p), l)


def attend_tables(
    q: Float[Tensor, "b l h p"],
    k: Float[Tensor, "b rl g p"],
    v: Float[Tensor, "b rl g p"],
    mem_k: Float[Tensor, "b c m g p"],
    mem_v: Float[Tensor, "b c m g p"],
    mem_valid: Bool[Tensor, "b c m"],
    window: int,
    chunk: int,
    key_valid: Bool[Tensor, "b rl"] | None,
    scale: float,
    block: int,
) -> Float[Tensor, "b l h p"]:
    """Window scores by blocks and memory scores by chunks, joined for one softmax."""
    b, l, h, p = q.shape
    g = k.shape[2]
    q = scale * q.view(b, l, g, h // g, p)
    keys, values = (torch.cat(_span_pieces(x, l, window, block), dim=2) for x in (k, v))
    s = keys.shape[2]
    near = torch.einsum("bntgxp,bnsgp->bntgxs", _blocks(q, block), keys)
    far = torch.einsum("bntgxp,bnmgp->bntgxm", _blocks(q, chunk), mem_k)
    scores = torch.cat([_flatten(near, l), _flatten(far, l)], dim=-1)
    near_visible = _window_visible(l, k.shape[1], window, block, key_valid, q.device)
    far_visible = mem_valid.repeat_interleave(chunk, dim=1)[:, :l]
    visible = torch.cat([_flatten(near_visible, l).expand(b, -1, -1), far_visible], dim=-1)
    weights = _masked_softmax(scores, visible[:, :, None, None])
    near, far = _blocks(weights[..., :s], block), _blocks(weights[..., s:], chunk)
    out = _flatten(torch.einsum("bntgxs,bnsgp->bntgxp", near, values), l)
    out = out + _flatten(torch.einsum("bntgxm,bnmgp->bntgxp", far, mem_v), l)
    return out.reshape(b, l, h, p)


def _pad(x: Tensor, front: int, back: int) -> Tensor:
    """Zeros before and after axis 1; negative numbers cut off."""
    return F.pad(x, [0, 0] * (x.ndim - 2) + [front, back]) if front or back else x


def _blocks(x: Tensor, size: int) -> Tensor:
    """(b, l, ...) -> (b, n, size, ...), the last block filled with zeros."""
    n = -(-x.shape[1] // size)
    return _pad(x, 0, n * size - x.shape[1]).unflatten(1, (n, size))


def _flatten(x: Tensor, l: int) -> Tensor:
    """(b, n, size, ...) -> (b, l, ...): undo ``_blocks``."""
    return x.flatten(1, 2)[:, :l]


def _own_memory(x: Tensor, n: int, block: int, chunk: int) -> Tensor:
    """(b, c, m, ...) -> (b, n, m, ...): the memory of the chunk in which each block lies."""
    if x.shape[1] == 1:
        return x.expand(-1, n, *x.shape[2:])
    return x.repeat_interleave(chunk // block, dim=1)[:, :n] if chunk > block else x


def _span_length(window: int, block: int) -> int:
    """block + window - 1 keys, rounded up: even rows run faster through the fused kernel."""
    return -(-(block + window - 1) // SPAN_MULTIPLE) * SPAN_MULTIPLE


def _span_pieces(x: Tensor, l: int, window: int, block: int) -> list[Tensor]:
    """(b, r+l, ...) -> the keys that each block's queries see, in pieces (b, n, <= block, ...).

    Concatenated along axis 2 they are the spans; the last key of a span is that of the block's
    last query. Neighbouring spans overlap: as shifted slices their gradient is a few additions,
    which is much cheaper than the gradient of one overlapping view.
    """
    n = -(-l // block)
    span = _span_length(window, block)
    shifts = range(0, span, block)
    front = span - block - (x.shape[1] - l)
    x = _pad(x, front, shifts[-1] + block - span + n * block - l)
    return [x[:, i : i + n * block].unflatten(1, (n, block))[:, :, : span - i] for i in shifts]


def _window_visible(
    l: int,
    length: int,
    window: int,
    block: int,
    key_valid: Bool[Tensor, "b rl"] | None,
    device: torch.device,
) -> Bool[Tensor, "b n t s"]:
    """Which keys of its block's span a query sees: a band of width w, and no padding."""
    t = torch.arange(block, device=device)[:, None]
    s = torch.arange(block - _span_length(window, block), block, device=device)  # 0: first query
    band = (s <= t) & (s > t - window)
    if key_valid is None:
        key_valid = torch.ones(1, length, dtype=torch.bool, device=device)
    return band & torch.cat(_span_pieces(key_valid, l, window, block), dim=2)[:, :, None, :]


def _fused_attention(
    q: Float[Tensor, "n h t p"],
    k: Float[Tensor, "n g s p"],
    v: Float[Tensor, "n g s p"],
    visible: Bool[Tensor, "#n 1 t s"],
    scale: float,
    some_blind: bool,
) -> Float[Tensor, "n h t p"]:
    """torch's fused softmax attention, 0 where a query sees nothing.

    A query without any visible key looks at all of them, which keeps the kernel's softmax and its
    gradient finite; its output is then replaced by 0. Callers that know that every query which
    counts sees a key save that pass (``some_blind=False``).
    """
    sees = visible.any(dim=-1, keepdim=True)
    bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device)
    bias = bias.masked_fill(sees & ~visible, -torch.inf)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped)
    return torch.where(sees, out, 0.0) if some_blind else out


def _masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over visible entries; a row without any is 0 and has zero gradient."""
    scores = torch.where(visible, scores, torch.where(visible.any(-1, True), -torch.inf, 0.0))
    return torch.where(visible, scores.softmax(dim=-1), 0.0)
