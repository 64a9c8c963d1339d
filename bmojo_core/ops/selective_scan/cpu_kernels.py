"""Compiled loops of the CPU selective scan: forward, and the gradients by hand.

    x_t = a_t x_{t-1} + (delta_t u_t) B_t ,   a_t = exp(delta_t A)
    y_t = (C_t . x_t + D u_t) silu(z_t)

Backward runs time in reverse. With g_t the gradient of the loss by x_t (all later uses included)
and h_t that by the ungated output:

    g_t  = C_t h_t + a_{t+1} g_{t+1}
    dC_t = sum_d h_t x_t             dB_t = sum_d g_t delta_t u_t
    d(delta_t u_t) = sum_n g_t B_t   dA = sum_t q_t delta_t      with q_t = g_t a_t x_{t-1}
    d delta_t = u_t sum_n g_t B_t + sum_n q_t A                  dx_0 = a_1 g_1

Channels are handled LANES at a time so that the innermost loop, over channels, is one or a few
vector instructions; a "tile" holds LANES channels of the state as (n, LANES). Only every SPAN-th
state is kept by the forward pass (`checkpoints`); backward recomputes the states between two
checkpoints, and no array of b l d n states ever exists.

A is passed transposed and padded with zero channels, (n, tiles*LANES); a zero channel stays zero.
A task is one sequence and one group of tiles; each writes its own part of every output.
"""

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

LANES = 16
SPAN = 32

# Multiply-adds may be fused; nothing else is relaxed, so NaN and infinity go through untouched.
OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}

LOG2E = 1.0 / math.log(2.0)
LOG2E_F32 = np.float32(LOG2E)
# 2^r on [-1/2, 1/2] as 1 + r (P1 + r (P2 + ...)): minimax in relative error (2e-9); exact at 0.
P1 = np.float32(0.6931472028585564)
P2 = np.float32(0.2402264791343027)
P3 = np.float32(0.05550332462934117)
P4 = np.float32(0.009618437353936247)
P5 = np.float32(0.0013398877841908619)
P6 = np.float32(0.00015353371298270534)
ONE = np.float32(1.0)
LOWEST = np.float32(-127.0)  # and below: 0
HIGHEST = np.float32(128.0)  # and above: infinity
ROUND = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the last bits


def exp2(v):
    """2 to the power v; in float32 made of instructions that exist for vectors."""
    return np.exp2(v)


@overload(exp2, jit_options={"fastmath": {"contract"}, "error_model": "numpy"})
def _exp2(v):
    if v != types.float32:
        return lambda v: np.exp2(v)

    def exp2_float32(v):
        v = LOWEST if v < LOWEST else v
        v = HIGHEST if v > HIGHEST else v
        shifted = v + ROUND
        r = v - (shifted - ROUND)
        p = ONE + r * (P1 + r * (P2 + r * (P3 + r * (P4 + r * (P5 + r * P6)))))
        exponent = np.int32((np.float32(shifted).view(np.int32) << 23) + 0x3F800000)
        return p * np.int32(exponent).view(np.float32)

    return exp2_float32


def sigmoid(v):
    """1 / (1 + exp(-v))."""
    return 1 / (1 + np.exp(-v))


@overload(sigmoid, jit_options={"fastmath": {"contract"}, "error_model": "numpy"})
def _sigmoid(v):
    if v != types.float32:
        return lambda v: 1 / (1 + np.exp(-v))
    return lambda v: ONE / (ONE + exp2(-LOG2E_F32 * v))


@njit(**OPTIONS)
def scan_forward(
    piece, first, last, groups, u, delta, A, B, C, D, z, gated, x0, y, last_state, checkpoints
):
    """Outputs, last states and checkpoints of tasks `first` to `last`.

    u, delta, z, y (b, l, d); A (n, tiles*LANES) in units of log 2; B, C (b, l, n); D (d,);
    x0, last_state (b, d, n); checkpoints (b, spans, tiles, n, LANES), the state before each span,
    or of zero spans when none are wanted.
    """
    l, d = u.shape[1:]
    n, tiles = A.shape[0], A.shape[1] // LANES
    x = np.zeros((n, LANES), u.dtype)
    rate = np.empty((n, LANES), u.dtype)
    step = np.zeros(LANES, u.dtype)
    drive = np.zeros(LANES, u.dtype)
    out = np.zeros(LANES, u.dtype)
    for task in range(first, last):
        row, group = task // groups, task % groups
        for tile in range(tiles * group // groups, tiles * (group + 1) // groups):
            c0 = tile * LANES
            width = min(LANES, d - c0)
            for k in range(n):
                for c in range(LANES):
                    rate[k, c] = A[k, c0 + c]
                    x[k, c] = 0
                for c in range(width):
                    x[k, c] = x0[row, c0 + c, k]
            step[:] = 0
            drive[:] = 0
            for t in range(l):
                if t % SPAN == 0 and checkpoints.shape[1] > 0:
                    checkpoints[row, t // SPAN, tile] = x
                for c in range(width):
                    step[c] = delta[row, t, c0 + c]
                    drive[c] = step[c] * u[row, t, c0 + c]
                    out[c] = D[c0 + c] * u[row, t, c0 + c]
                for k in range(n):
                    in_gain, out_gain = B[row, t, k], C[row, t, k]
                    for c in range(LANES):
                        x[k, c] = exp2(step[c] * rate[k, c]) * x[k, c] + drive[c] * in_gain
                        out[c] += out_gain * x[k, c]
                for c in range(width):
                    y[row, t, c0 + c] = out[c]
                if gated:
                    for c in range(width):
                        v = z[row, t, c0 + c]
                        y[row, t, c0 + c] = out[c] * v * sigmoid(v)
            for k in range(n):
                for c in range(width):
                    last_state[row, c0 + c, k] = x[k, c]


@njit(**OPTIONS)
def scan_backward(
    piece, first, last, groups,
    u, delta, A, B, C, D, z, gated, checkpoints, dy, dlast,
    du, ddelta, dA, dB, dC, dD, dz, dx0,
):  # fmt: skip
    """Gradients of tasks `first` to `last`; shapes as in `scan_forward` where not said.

    dy (b, l, d) and dlast (b, d, n) come in. du, ddelta, dz (b, l, d) and dx0 (b, d, n) are
    written; dB, dC (groups, b, l, n) are written, to be summed over groups;
    dA (pieces, tiles, n, LANES) and dD (pieces, tiles*LANES) are added to, to be summed over
    pieces. dA is the gradient by the natural A, with A given in units of log 2.
    """
    l, d = u.shape[1:]
    n, tiles = A.shape[0], A.shape[1] // LANES
    dtype = u.dtype
    rate = np.empty((tiles, n, LANES), dtype)
    for tile in range(tiles):
        for k in range(n):
            for c in range(LANES):
                rate[tile, k, c] = A[k, tile * LANES + c]
    to_A = np.zeros((tiles, n, LANES), dtype)
    g = np.zeros((tiles, n, LANES), dtype)
    decays = np.empty((SPAN, n, LANES), dtype)
    states = np.empty((SPAN + 1, n, LANES), dtype)
    to_B = np.empty((SPAN, n, LANES), dtype)
    to_C = np.empty((SPAN, n, LANES), dtype)
    step = np.zeros((SPAN, LANES), dtype)
    value = np.zeros((SPAN, LANES), dtype)
    drive = np.zeros((SPAN, LANES), dtype)
    out = np.zeros((SPAN, LANES), dtype)
    h = np.zeros((SPAN, LANES), dtype)
    through_B = np.empty(LANES, dtype)
    through_decay = np.empty(LANES, dtype)
    ln2 = np.full(1, math.log(2.0), dtype)
    for task in range(first, last):
        row, group = task // groups, task % groups
        tile0, tile1 = tiles * group // groups, tiles * (group + 1) // groups
        for tile in range(tile0, tile1):
            c0 = tile * LANES
            for k in range(n):
                for c in range(min(LANES, d - c0)):
                    g[tile, k, c] = dlast[row, c0 + c, k]
        for span in range((l - 1) // SPAN, -1, -1):
            t0 = span * SPAN
            length = min(SPAN, l - t0)
            to_B[:] = 0
            to_C[:] = 0
            for tile in range(tile0, tile1):
                c0 = tile * LANES
                width = min(LANES, d - c0)
                for k in range(n):
                    for c in range(LANES):
                        states[0, k, c] = checkpoints[row, span, tile, k, c]
                if width < LANES:
                    step[:] = 0
                    value[:] = 0
                    drive[:] = 0
                    h[:] = 0
                for i in range(length):
                    for c in range(width):
                        step[i, c] = delta[row, t0 + i, c0 + c]
                        value[i, c] = u[row, t0 + i, c0 + c]
                        drive[i, c] = step[i, c] * value[i, c]
                        h[i, c] = dy[row, t0 + i, c0 + c]
                        out[i, c] = D[c0 + c] * value[i, c]
                for i in range(length):
                    for k in range(n):
                        in_gain, out_gain = B[row, t0 + i, k], C[row, t0 + i, k]
                        for c in range(LANES):
                            decay = exp2(step[i, c] * rate[tile, k, c])
                            decays[i, k, c] = decay
                            state = decay * states[i, k, c] + drive[i, c] * in_gain
                            states[i + 1, k, c] = state
                            out[i, c] += out_gain * state
                if gated:
                    for i in range(length):
                        for c in range(width):
                            v = z[row, t0 + i, c0 + c]
                            s = sigmoid(v)
                            slope = s * (ONE + v * (ONE - s))
                            dz[row, t0 + i, c0 + c] = h[i, c] * out[i, c] * slope
                            h[i, c] *= v * s
                for i in range(length - 1, -1, -1):
                    for c in range(LANES):
                        through_B[c] = 0
                        through_decay[c] = 0
                    for k in range(n):
                        in_gain, out_gain = B[row, t0 + i, k], C[row, t0 + i, k]
                        for c in range(LANES):
                            g_t = g[tile, k, c] + out_gain * h[i, c]
                            to_C[i, k, c] += h[i, c] * states[i + 1, k, c]
                            to_B[i, k, c] += g_t * drive[i, c]
                            through_B[c] += g_t * in_gain
                            g_t *= decays[i, k, c]
                            g[tile, k, c] = g_t
                            q = g_t * states[i, k, c]
                            through_decay[c] += q * rate[tile, k, c]
                            to_A[tile, k, c] += q * step[i, c]
                    for c in range(width):
                        v, s = value[i, c], step[i, c]
                        du[row, t0 + i, c0 + c] = through_B[c] * s + D[c0 + c] * h[i, c]
                        ddelta[row, t0 + i, c0 + c] = through_B[c] * v + ln2[0] * through_decay[c]
                        dD[piece, c0 + c] += h[i, c] * v
            for i in range(length):
                for k in range(n):
                    a = to_B[i, k, 0]
                    e = to_C[i, k, 0]
                    for c in range(1, LANES):
                        a += to_B[i, k, c]
                        e += to_C[i, k, c]
                    dB[group, row, t0 + i, k] = a
                    dC[group, row, t0 + i, k] = e
        for tile in range(tile0, tile1):
            c0 = tile * LANES
            for k in range(n):
                for c in range(min(LANES, d - c0)):
                    dx0[row, c0 + c, k] = g[tile, k, c]
    dA[piece] = to_A
