"""Root mean square norm of one position, compiled."""

import math

import numpy as np
from numba import njit

from bmojo_core.ops._arrays import floats


@njit(cache=True, nogil=True)
def norm_step(h_at, weight_at, out_at, eps, b, d):
    """h, out (b, d); weight (d,). Squares are summed in double precision."""
    h, out, weight = floats(h_at, (b, d)), floats(out_at, (b, d)), floats(weight_at, (d,))
    for row in range(b):
        total = 0.0
        for c in range(d):
            x = float(h[row, c])
            total += x * x
        scale = np.float32(1.0 / math.sqrt(total / d + eps))
        for c in range(d):
            out[row, c] = h[row, c] * scale * weight[c]
