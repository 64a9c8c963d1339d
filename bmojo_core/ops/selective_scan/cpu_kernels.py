"""Compiled loops of the CPU selective scan: forward, and the gradients by hand.

    x_t = a_t x_{t-1} + (delta_t u_t) B_t ,   a_t = exp(delta_t A)
    y_t = (C_t . x_t + D u_t) silu(z_t)

Backward runs time in reverse. With g_t the gradient of the loss by x_t (all later uses included)
and h_t that by the ungated output:

    g_t  = C_t h_t + a_{t+1} g_{t+1}
    dC_t = sum_d h_t x_t             dB_t = sum_d g_t delta_t u_t
    d(delta_t u_t) = sum_n g_t B_t   dA = sum_t q_t delta_t      with q_t = g_t a_t x_{t-1}
    d delta_t = u_t sum_n g_t B_t + sum_n q_t A                  dx_0 = a_1 g_1

Channels are handled LANES at a time, as values of a small vector type of our own (`load`, `store`,
`splat`, `+`, `*`, `exp2`), so that vector instructions do not hang on the compiler's guesses about
aliasing; a "tile" is the state of LANES channels as (n, LANES). Only every SPAN-th
state is kept by the forward pass (`checkpoints`); backward recomputes the states between two
checkpoints, and no array of b l d n states ever exists.

A is passed transposed and padded with zero channels, (n, tiles*LANES); a zero channel stays zero.
A task is one sequence and one group of tiles; each writes its own part of every output.
"""

import math
import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
SPAN = 32

# Multiply-adds may be fused; nothing else is relaxed, so NaN and infinity go through untouched.
OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}

LOG2E = 1.0 / math.log(2.0)
LOG2E_F32 = np.float32(LOG2E)
# 2^r on [-1/2, 1/2], lowest power first: minimax in relative error (2e-9), and exact at 0.
POLYNOMIAL = (
    1.0,
    0.6931472028585564,
    0.2402264791343027,
    0.05550332462934117,
    0.009618437353936247,
    0.0013398877841908619,
    0.00015353371298270534,
)
ONE = np.float32(1.0)
LOWEST = -127.0  # and below: 0
HIGHEST = 128.0  # and above: infinity
ROUND = 1.5 * 2**23  # adding it leaves the nearest integer in the last bits


class LanesType(types.Type):
    """LANES numbers of one dtype, held in vector registers."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        element = manager.lookup(lanes.dtype).get_data_type()
        super().__init__(manager, lanes, ir.VectorType(element, LANES))


def _pointer(context, builder, array_type, array, index_type, index):
    """Pointer to the LANES consecutive numbers at `array[index]`."""
    leading = cgutils.unpack_tuple(builder, index, len(index_type))
    indices = [*leading, context.get_constant(types.intp, 0)]
    view = context.make_array(array_type)(context, builder, array)
    pointer = cgutils.get_item_pointer(context, builder, array_type, view, indices)
    element = context.get_data_type(array_type.dtype)
    return builder.bitcast(pointer, ir.VectorType(element, LANES).as_pointer())


@intrinsic
def load(typing, array, index):
    """The lanes at `array[index]`, where the last axis of `array` is LANES long."""

    def build(context, builder, signature, arguments):
        pointer = _pointer(context, builder, array, arguments[0], index, arguments[1])
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return LanesType(array.dtype)(array, index), build


@intrinsic
def store(typing, array, index, lanes):
    """Put `lanes` at `array[index]`."""

    def build(context, builder, signature, arguments):
        pointer = _pointer(context, builder, array, arguments[0], index, arguments[1])
        builder.store(arguments[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, index, lanes), build


@intrinsic
def splat(typing, number):
    """The same number in every lane."""

    def build(context, builder, signature, arguments):
        vector = ir.VectorType(arguments[0].type, LANES)
        empty = ir.Constant(vector, ir.Undefined)
        one = builder.insert_element(empty, arguments[0], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(one, empty, zeros)

    return LanesType(number)(number), build


def _arithmetic(instruction):
    @intrinsic
    def apply(typing, a, b):
        def build(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments, flags=("contract",))

        return a(a, b), build

    return apply


_add, _mul = _arithmetic("fadd"), _arithmetic("fmul")


@overload(operator.add)
def _lanes_add(a, b):
    if isinstance(a, LanesType) and isinstance(b, LanesType):
        return lambda a, b: _add(a, b)


@overload(operator.mul)
def _lanes_mul(a, b):
    if isinstance(a, LanesType) and isinstance(b, LanesType):
        return lambda a, b: _mul(a, b)


@intrinsic
def exp2(typing, v):
    """2 to the power v, for a number or in every lane; in float32 exact at 0, 0 below -127."""

    def build(context, builder, signature, arguments):
        (x,) = arguments
        lanes = isinstance(v, LanesType)
        if getattr(v, "dtype", v) != types.float32:  # float64 serves checks: one call per lane
            double = builder.module.declare_intrinsic("llvm.exp2", [ir.DoubleType()])
            if not lanes:
                return builder.call(double, [x])
            for c in range(LANES):
                at = ir.Constant(ir.IntType(32), c)
                number = builder.call(double, [builder.extract_element(x, at)])
                x = builder.insert_element(x, number, at)
            return x
        int32 = ir.VectorType(ir.IntType(32), LANES) if lanes else ir.IntType(32)

        def constant(number, kind=x.type):
            number = number if kind == int32 else float(number)
            return ir.Constant(kind, [number] * LANES if lanes else number)

        def bounded(x, relation, limit):  # a comparison with NaN is false: NaN goes through
            return builder.select(builder.fcmp_ordered(relation, x, limit), limit, x)

        x = bounded(bounded(x, "<", constant(LOWEST)), ">", constant(HIGHEST))
        shifted = builder.fadd(x, constant(ROUND))
        r = builder.fsub(x, builder.fsub(shifted, constant(ROUND)))
        p = constant(POLYNOMIAL[-1])
        for coefficient in reversed(POLYNOMIAL[:-1]):
            p = builder.fmul(p, r, flags=("contract",))
            p = builder.fadd(p, constant(coefficient), flags=("contract",))
        exponent = builder.shl(builder.bitcast(shifted, int32), constant(23, int32))
        power = builder.add(exponent, constant(127 << 23, int32))  # the bits of 2^round(x)
        return builder.fmul(p, builder.bitcast(power, x.type))

    return v(v), build


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
                steps, drives, outs = load(step, ()), load(drive, ()), load(out, ())
                for k in range(n):
                    decay = exp2(steps * load(rate, (k,)))
                    state = decay * load(x, (k,)) + drives * splat(B[row, t, k])
                    store(x, (k,), state)
                    outs = outs + splat(C[row, t, k]) * state
                store(out, (), outs)
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
    through_B = np.empty((SPAN, LANES), dtype)
    through_decay = np.empty((SPAN, LANES), dtype)
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
                replay(step, drive, rate, B[row], C[row], tile, t0, length, states, decays, out)
                if gated:
                    for i in range(length):
                        for c in range(width):
                            v = z[row, t0 + i, c0 + c]
                            s = sigmoid(v)
                            slope = s * (ONE + v * (ONE - s))
                            dz[row, t0 + i, c0 + c] = h[i, c] * out[i, c] * slope
                            h[i, c] *= v * s
                reverse(
                    step, drive, h, rate, B[row], C[row], tile, t0, length,
                    states, decays, g, to_A, to_B, to_C, through_B, through_decay,
                )  # fmt: skip
                for i in range(length):
                    for c in range(width):
                        v, s = value[i, c], step[i, c]
                        du[row, t0 + i, c0 + c] = through_B[i, c] * s + D[c0 + c] * h[i, c]
                        by_step = through_B[i, c] * v + ln2[0] * through_decay[i, c]
                        ddelta[row, t0 + i, c0 + c] = by_step
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


@njit(**OPTIONS)
def replay(step, drive, rate, B, C, tile, t0, length, states, decays, out):
    """Recompute the states of one tile over one span, from `states[0]`; keep the decays.

    step, drive, out (SPAN, LANES); rate (tiles, n, LANES); B, C (l, n) of one sequence;
    states (SPAN+1, n, LANES); decays (SPAN, n, LANES). Adds C . x to `out`.
    """
    for i in range(length):
        steps, drives, outs = load(step, (i,)), load(drive, (i,)), load(out, (i,))
        for k in range(rate.shape[1]):
            decay = exp2(steps * load(rate, (tile, k)))
            state = decay * load(states, (i, k)) + drives * splat(B[t0 + i, k])
            store(decays, (i, k), decay)
            store(states, (i + 1, k), state)
            outs = outs + splat(C[t0 + i, k]) * state
        store(out, (i,), outs)


@njit(**OPTIONS)
def reverse(
    step, drive, h, rate, B, C, tile, t0, length,
    states, decays, g, to_A, to_B, to_C, through_B, through_decay,
):  # fmt: skip
    """Carry `g` of one tile back over one span, adding to `to_A`, `to_B` and `to_C` by lane.

    Shapes as in `replay`; g, to_A (tiles, n, LANES); to_B, to_C (SPAN, n, LANES). Writes
    through_B = sum_n g B and through_decay = sum_n q A, both (SPAN, LANES).
    """
    for i in range(length - 1, -1, -1):
        steps, drives, h_t = load(step, (i,)), load(drive, (i,)), load(h, (i,))
        by_B = by_decay = splat(h.dtype.type(0))
        for k in range(rate.shape[1]):
            g_t = load(g, (tile, k)) + splat(C[t0 + i, k]) * h_t
            store(to_C, (i, k), load(to_C, (i, k)) + h_t * load(states, (i + 1, k)))
            store(to_B, (i, k), load(to_B, (i, k)) + g_t * drives)
            by_B = by_B + g_t * splat(B[t0 + i, k])
            g_t = g_t * load(decays, (i, k))
            store(g, (tile, k), g_t)
            q = g_t * load(states, (i, k))
            by_decay = by_decay + q * load(rate, (tile, k))
            store(to_A, (tile, k), load(to_A, (tile, k)) + q * steps)
        store(through_B, (i,), by_B)
        store(through_decay, (i,), by_decay)
