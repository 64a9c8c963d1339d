"""Plain causal or sliding-window attention by the flash-attn package (CUDA, half precision).

    out_i = sum_j softmax_j(scale q_i.k_j) v_j,    i + r - w < j <= i + r

q (b, l, h, p); k, v (b, r+l, g, p). Memory tokens and padding are not part of that kernel.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def memory_attention_flash(
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
    """Sliding-window attention; see ``bmojo_core.ops.memory_attention``.

    Raises
    ------
    ValueError
        Memory tokens or key_valid were given.
    ImportError
        flash-attn is not installed.
    """
    if mem_k is not None or key_valid is not None:
        raise ValueError(
            "backend 'flash_attn' has neither memory tokens nor key_valid; use 'gpu' or 'reference'"
        )
    from flash_attn import flash_attn_func

    left = -1 if window is None else window - 1
    # causal is aligned to the last key, so r carried keys in front need no offset
    return flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=(left, 0))
