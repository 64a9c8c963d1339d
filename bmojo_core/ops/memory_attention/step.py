"""One position of the window's register on the CPU: its key and value into the ring, in place.

ring_k, ring_v (b, g, m + w, p); k, v (b, 1, g, p); read (b,) tokens before this one.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bmojo_core.ops._numpy import is_plain, may_be_written, run_on


def write_compiled(
    ring_k: Float[Tensor, "b g mw p"], ring_v: Float[Tensor, "b g mw p"],
    k: Float[Tensor, "b 1 g p"], v: Float[Tensor, "b 1 g p"], read: Int[Tensor, "b"], w: int,
) -> bool:  # fmt: skip
    """Write as one loop, where that may be; False where nothing was done."""
    b, g, _, p = ring_k.shape
    plain = ring_k.dtype is ring_v.dtype is torch.float32 and read.dtype is torch.int64
    fit = plain and read.is_cpu and is_plain(k, b, 1, g, p) and is_plain(v, b, 1, g, p)
    if not (fit and ring_v.shape == ring_k.shape and may_be_written(ring_k, ring_v)):
        return False
    from bmojo_core.ops.memory_attention.step_kernels import write_one

    run_on(write_one, ring_k, ring_v, k, v, read, w, *ring_k.shape)
    return True
