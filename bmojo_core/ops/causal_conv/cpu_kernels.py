"""Compiled loops of the CPU causal convolution: the linear filter, and its gradients by hand.

    a_t = sum_{j<k} weight_j v_{t+j} + bias,   with v = (initial_state, x) along time
    dv_t = sum_j weight_j da_{t-j},   dweight_j = sum_t da_t v_{t+j},   dbias = sum_t da_t

Channels run innermost. A task is one sequence.
"""

from numba import njit

from bmojo_core.ops._arrays import floats
from bmojo_core.ops.selective_scan.cpu_kernels import sigmoid

# Multiply-adds may be fused; nothing else is relaxed, so NaN and infinity go through untouched.
OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}


@njit(**OPTIONS)
def filter_forward(piece, first, last, x, weight, bias, past, a):
    """x, a (b, l, d); weight (k, d); bias (d,); past (b, k-1, d). Writes a."""
    l, d = x.shape[1:]
    k = weight.shape[0]
    for row in range(first, last):
        for t in range(l):
            for c in range(d):
                a[row, t, c] = bias[c] + weight[k - 1, c] * x[row, t, c]
            for j in range(k - 1):
                s = t + j - (k - 1)
                if s >= 0:
                    for c in range(d):
                        a[row, t, c] += weight[j, c] * x[row, s, c]
                else:
                    for c in range(d):
                        a[row, t, c] += weight[j, c] * past[row, s + k - 1, c]


@njit(**OPTIONS)
def filter_backward(piece, first, last, x, weight, past, da, dx, dweight, dbias, dpast):
    """Shapes as above. Writes dx, dpast; adds to dweight (pieces, k, d), dbias (pieces, d)."""
    l, d = x.shape[1:]
    k = weight.shape[0]
    for row in range(first, last):
        dpast[row] = 0
        for t in range(l):
            for c in range(d):
                dx[row, t, c] = weight[k - 1, c] * da[row, t, c]
                dbias[piece, c] += da[row, t, c]
                dweight[piece, k - 1, c] += da[row, t, c] * x[row, t, c]
            for j in range(k - 1):
                s = t + j - (k - 1)
                if s >= 0:
                    for c in range(d):
                        dx[row, s, c] += weight[j, c] * da[row, t, c]
                        dweight[piece, j, c] += da[row, t, c] * x[row, s, c]
                else:
                    for c in range(d):
                        dpast[row, s + k - 1, c] += weight[j, c] * da[row, t, c]
                        dweight[piece, j, c] += da[row, t, c] * past[row, s + k - 1, c]


@njit(**OPTIONS)
def filter_step(x_at, weight_at, bias_at, past_at, y_at, b, d, k):
    """One position, with silu: x, y (b, d); weight (d, k); bias (d,); past (b, k-1, d)."""
    x, y = floats(x_at, (b, d)), floats(y_at, (b, d))
    weight, bias = floats(weight_at, (d, k)), floats(bias_at, (d,))
    past = floats(past_at, (b, k - 1, d))
    for row in range(b):
        for c in range(d):
            y[row, c] = bias[c] + weight[c, k - 1] * x[row, c]
        for j in range(k - 1):
            for c in range(d):
                y[row, c] += weight[c, j] * past[row, j, c]
        for c in range(d):
            y[row, c] *= sigmoid(y[row, c])
