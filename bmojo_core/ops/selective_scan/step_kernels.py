"""One position of the selective scan as a compiled loop: every number is read and written once.

    x_1 = exp(delta A) x_0 + delta B u ;   y = (C . x_1 + D u) silu(z) ;   delta = softplus(r + b)

The states of a channel lie side by side, so LANES of them are handled at a time (see
``cpu_kernels``, which works on LANES channels instead).
"""

import numpy as np
from numba import njit

from bmojo_core.ops._arrays import floats
from bmojo_core.ops.selective_scan.cpu_kernels import (
    LANES,
    LOG2E_F32,
    OPTIONS,
    exp2,
    load,
    sigmoid,
    splat,
    store,
)

LINEAR = np.float32(20.0)  # beyond, softplus is the identity (torch's threshold)


@njit(**OPTIONS)
def scan_step(u_at, r_at, bias_at, A_at, B_at, C_at, D_at, z_at, x_0_at, y_at, x_1_at, b, d, n):
    """u, r, z, y (b, d); bias, D (d,); A (d, n); B, C (b, n); x_0, x_1 (b, d, n). Writes y, x_1."""
    tiles = n // LANES
    u, r = floats(u_at, (b, d)), floats(r_at, (b, d))
    z, y = floats(z_at, (b, d)), floats(y_at, (b, d))
    bias, D = floats(bias_at, (d,)), floats(D_at, (d,))
    A = floats(A_at, (d, tiles, LANES))
    B, C = floats(B_at, (b, tiles, LANES)), floats(C_at, (b, tiles, LANES))
    x_0, x_1 = floats(x_0_at, (b, d, tiles, LANES)), floats(x_1_at, (b, d, tiles, LANES))
    products = np.zeros(LANES, np.float32)
    for row in range(b):
        for c in range(d):
            delta = r[row, c] + bias[c]
            if not delta > LINEAR:
                delta = np.log1p(exp2(LOG2E_F32 * delta))
            rate, drive = splat(LOG2E_F32 * delta), splat(delta * u[row, c])
            products[:] = 0
            total = load(products, ())
            for s in range(tiles):
                decay = exp2(rate * load(A, (c, s)))
                state = decay * load(x_0, (row, c, s)) + drive * load(B, (row, s))
                store(x_1, (row, c, s), state)
                total = total + load(C, (row, s)) * state
            store(products, (), total)
            out = D[c] * u[row, c]
            for i in range(LANES):
                out += products[i]
            y[row, c] = out * z[row, c] * sigmoid(z[row, c])
