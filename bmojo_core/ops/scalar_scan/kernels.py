r"""Triton kernels of the scalar scan by chunks (see ``gpu.py`` for the equations).

Names inside a kernel: a chunk is Q positions; P and N are channels of a head and states, P_PAD and
N_PAD the same rounded up to a power of two of at least 16; s (and its remainder r, for float32 is
too short for a long sum) the sum of log-decays from the chunk's beginning. ``step``, ``sum`` and
``rest`` (b, h, k, Q) have zero steps behind the sequence's end, so that a last chunk that is not
full holds its state. Indices of time are int64: a batch may have more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(base, first, count, stride, WIDTH: tl.constexpr, PAD: tl.constexpr, Q: tl.constexpr):
    """Rows first .. first + Q of a (count, WIDTH) matrix, zeros outside."""
    row = tl.arange(0, Q)
    column = tl.arange(0, PAD)
    inside = (row[:, None] < count - first) & (column[None, :] < WIDTH)
    place = base + first * stride  # in 64 bits once, in 32 within the tile
    return tl.load(place + (row[:, None] * stride + column[None, :]), mask=inside, other=0.0)


@triton.jit
def _store_tile(
    base, value, first, count, stride, WIDTH: tl.constexpr, PAD: tl.constexpr, Q: tl.constexpr
):
    row = tl.arange(0, Q)
    column = tl.arange(0, PAD)
    inside = (row[:, None] < count - first) & (column[None, :] < WIDTH)
    to = base + first * stride + (row[:, None] * stride + column[None, :])
    tl.store(to, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _state(base, P: tl.constexpr, N: tl.constexpr, P_PAD: tl.constexpr, N_PAD: tl.constexpr):
    """One head's (P, N) state, zeros outside."""
    row = tl.arange(0, P_PAD)
    column = tl.arange(0, N_PAD)
    inside = (row[:, None] < P) & (column[None, :] < N)
    return tl.load(base + (row[:, None] * N + column[None, :]), mask=inside, other=0.0)


@triton.jit
def _store_state(
    base, value, P: tl.constexpr, N: tl.constexpr, P_PAD: tl.constexpr, N_PAD: tl.constexpr
):
    row = tl.arange(0, P_PAD)
    column = tl.arange(0, N_PAD)
    inside = (row[:, None] < P) & (column[None, :] < N)
    tl.store(base + (row[:, None] * N + column[None, :]), value, mask=inside)


@triton.jit
def _to_end(sum_, rest_, at, Q: tl.constexpr):
    """exp of the log-decays from each position to the chunk's end."""
    i = tl.arange(0, Q)
    s, r = tl.load(sum_ + at + i), tl.load(rest_ + at + i)
    last, last_rest = tl.load(sum_ + at + Q - 1), tl.load(rest_ + at + Q - 1)
    return tl.exp((last - s) + (last_rest - r))


@triton.jit
def _between(sum_, rest_, at, Q: tl.constexpr):
    """L[i, j] = exp(log-decays from j to i) for j <= i, else 0."""
    i = tl.arange(0, Q)
    s, r = tl.load(sum_ + at + i), tl.load(rest_ + at + i)
    seen = i[:, None] >= i[None, :]
    exponent = (s[:, None] - s[None, :]) + (r[:, None] - r[None, :])
    return tl.where(seen, tl.exp(tl.where(seen, exponent, 0.0)), 0.0)


@triton.jit
def _gated(dy_, z_, place_dy, place_z, first, l, dy_l, z_l, P: tl.constexpr, P_PAD: tl.constexpr,
           Q: tl.constexpr, HAS_Z: tl.constexpr):  # fmt: skip
    """Gradient of the output before the gate, in float32."""
    dy = _tile(dy_ + place_dy, first, l, dy_l, P, P_PAD, Q).to(tl.float32)
    if HAS_Z:
        z = _tile(z_ + place_z, first, l, z_l, P, P_PAD, Q).to(tl.float32)
        dy = dy * z * tl.sigmoid(z)
    return dy


@triton.jit
def sums(step_, decay_, step, sum_, rest_, l, chunks, H: tl.constexpr, Q: tl.constexpr):
    """Steps by head and chunk, and the running sums of log-decays, summed in float64."""
    k, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.arange(0, Q)
    t = k.to(tl.int64) * Q + i
    given = (b * l + t) * H + head
    a = tl.load(decay_ + given, mask=t < l, other=0.0).to(tl.float64)
    total = tl.sum(tl.where(i[None, :] <= i[:, None], a[None, :], 0.0), axis=1)
    high = total.to(tl.float32)
    to = ((b * H + head) * chunks + k) * Q + i
    tl.store(step + to, tl.load(step_ + given, mask=t < l, other=0.0))
    tl.store(sum_ + to, high)
    tl.store(rest_ + to, (total - high.to(tl.float64)).to(tl.float32))


@triton.jit
def chunk_states(
    u_, B_, step_, sum_, rest_, out_, u_b, u_l, B_b, B_l, l, chunks,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, P_PAD: tl.constexpr, N_PAD: tl.constexpr,
    Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk alone leaves behind: sum_j exp(s_last - s_j) delta_j u_j B_j^T, in float32."""
    k, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = k.to(tl.int64) * Q
    at = ((b * H + head) * chunks + k) * Q
    weight = _to_end(sum_, rest_, at, Q) * tl.load(step_ + at + tl.arange(0, Q))
    u = _tile(u_ + b * u_b + head * P, first, l, u_l, P, P_PAD, Q)
    B = _tile(B_ + b * B_b, first, l, B_l, N, N_PAD, Q)
    drive = (u.to(tl.float32) * weight[:, None]).to(B.dtype)
    added = tl.dot(tl.trans(drive), B, input_precision=PRECISION)
    _store_state(out_ + ((b * chunks + k) * H + head) * P * N, added, P, N, P_PAD, N_PAD)


@triton.jit
def chunk_state_gradients(
    dy_, z_, C_, sum_, rest_, out_, dy_b, dy_l, z_b, z_l, C_b, C_l, l, chunks,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, P_PAD: tl.constexpr, N_PAD: tl.constexpr,
    Q: tl.constexpr, PRECISION: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """What a chunk's outputs ask of the state before it: sum_i exp(s_i) dy_i C_i^T."""
    k, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = k.to(tl.int64) * Q
    at = ((b * H + head) * chunks + k) * Q
    i = tl.arange(0, Q)
    fade = tl.exp(tl.load(sum_ + at + i) + tl.load(rest_ + at + i))
    dy = _gated(dy_, z_, b * dy_b + head * P, b * z_b + head * P, first, l, dy_l, z_l,
                P, P_PAD, Q, HAS_Z)  # fmt: skip
    C = _tile(C_ + b * C_b, first, l, C_l, N, N_PAD, Q)
    asked = tl.dot(tl.trans((dy * fade[:, None]).to(C.dtype)), C, input_precision=PRECISION)
    _store_state(out_ + ((b * chunks + k) * H + head) * P * N, asked, P, N, P_PAD, N_PAD)


@triton.jit
def _fetch(added_, sum_, rest_, c, b, head, e, inside, chunks, first, direction,
           H: tl.constexpr, SIZE: tl.constexpr, Q: tl.constexpr):  # fmt: skip
    """Of the c-th chunk on the way: its place, whether it exists, its decay, what it adds."""
    k = first + c * direction
    exists = c < chunks
    place = ((b * chunks + k) * H + head) * SIZE + e
    end = ((b * H + head) * chunks + k) * Q + Q - 1
    log_decay = tl.load(sum_ + end, mask=exists, other=0.0)
    log_decay += tl.load(rest_ + end, mask=exists, other=0.0)
    added = tl.load(added_ + place, mask=inside & exists, other=0.0)
    return place, inside & exists, tl.exp(log_decay), added


@triton.jit
def pass_states(
    added_, start_, sum_, rest_, held_, end_, chunks, first, direction,
    H: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """X <- exp(s_last) X + added, chunk by chunk from `first` in steps of `direction`, +1 or -1.

    Writes the state that every chunk finds, and the one after all. Four chunks are read before the
    first is used, so that not every one waits for the memory.
    """
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < SIZE
    X = tl.load(start_ + (b * H + head) * SIZE + e, mask=inside, other=0.0)
    for c in range(0, chunks, 4):
        to0, w0, f0, a0 = _fetch(added_, sum_, rest_, c, b, head, e, inside, chunks, first,
                                 direction, H, SIZE, Q)  # fmt: skip
        to1, w1, f1, a1 = _fetch(added_, sum_, rest_, c + 1, b, head, e, inside, chunks, first,
                                 direction, H, SIZE, Q)  # fmt: skip
        to2, w2, f2, a2 = _fetch(added_, sum_, rest_, c + 2, b, head, e, inside, chunks, first,
                                 direction, H, SIZE, Q)  # fmt: skip
        to3, w3, f3, a3 = _fetch(added_, sum_, rest_, c + 3, b, head, e, inside, chunks, first,
                                 direction, H, SIZE, Q)  # fmt: skip
        tl.store(held_ + to0, X.to(held_.dtype.element_ty), mask=w0)
        X = f0 * X + a0
        tl.store(held_ + to1, X.to(held_.dtype.element_ty), mask=w1)
        X = f1 * X + a1
        tl.store(held_ + to2, X.to(held_.dtype.element_ty), mask=w2)
        X = f2 * X + a2
        tl.store(held_ + to3, X.to(held_.dtype.element_ty), mask=w3)
        X = f3 * X + a3
    tl.store(end_ + (b * H + head) * SIZE + e, X, mask=inside)


@triton.jit
def outputs(
    u_, z_, B_, C_, D_, step_, sum_, rest_, state_, y_,
    u_b, u_l, z_b, z_l, B_b, B_l, C_b, C_l, l, chunks, per,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, P_PAD: tl.constexpr, N_PAD: tl.constexpr,
    Q: tl.constexpr, PRECISION: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """y of one chunk for `per` heads, which share the products C_i . B_j."""
    k, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = k.to(tl.int64) * Q
    B = _tile(B_ + b * B_b, first, l, B_l, N, N_PAD, Q)
    C = _tile(C_ + b * C_b, first, l, C_l, N, N_PAD, Q)
    CB = tl.dot(C, tl.trans(B), input_precision=PRECISION)
    i, p = tl.arange(0, Q), tl.arange(0, P_PAD)
    for head in range(group * per, tl.minimum(group * per + per, H)):
        at = ((b * H + head) * chunks + k) * Q
        step = tl.load(step_ + at + i)
        fade = tl.exp(tl.load(sum_ + at + i) + tl.load(rest_ + at + i))
        u = _tile(u_ + b * u_b + head * P, first, l, u_l, P, P_PAD, Q)
        X = _state(state_ + ((b * chunks + k) * H + head) * P * N, P, N, P_PAD, N_PAD)
        weights = CB * _between(sum_, rest_, at, Q) * step[None, :]
        y = tl.dot(C.to(X.dtype), tl.trans(X), input_precision=PRECISION) * fade[:, None]
        y = tl.dot(weights.to(u.dtype), u, y, input_precision=PRECISION)
        if HAS_D:
            D = tl.load(D_ + head * P + p, mask=p < P, other=0.0).to(tl.float32)
            y += D[None, :] * u.to(tl.float32)
        if HAS_Z:
            z = _tile(z_ + b * z_b + head * P, first, l, z_l, P, P_PAD, Q).to(tl.float32)
            y = y * z * tl.sigmoid(z)
        _store_tile(y_ + b * l * (H * P) + head * P, y, first, l, H * P, P, P_PAD, Q)


@triton.jit
def head_gradients(
    dy_, u_, z_, B_, C_, D_, step_, sum_, rest_, state_, future_,
    du_, dz_, dD_, dstep_, ddecay_,
    dy_b, dy_l, u_b, u_l, z_b, z_l, B_b, B_l, C_b, C_l, l, chunks,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, P_PAD: tl.constexpr, N_PAD: tl.constexpr,
    Q: tl.constexpr, PRECISION: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Gradients of u, z, D, steps and log-decays of one chunk of one head."""
    k, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = k.to(tl.int64) * Q
    at = ((b * H + head) * chunks + k) * Q
    place = ((b * chunks + k) * H + head) * P * N
    row = b * l * (H * P) + head * P
    i, p = tl.arange(0, Q), tl.arange(0, P_PAD)
    t = first + i
    step = tl.load(step_ + at + i)
    B = _tile(B_ + b * B_b, first, l, B_l, N, N_PAD, Q)
    C = _tile(C_ + b * C_b, first, l, C_l, N, N_PAD, Q)
    u = _tile(u_ + b * u_b + head * P, first, l, u_l, P, P_PAD, Q)
    X = _state(state_ + place, P, N, P_PAD, N_PAD)
    R = _state(future_ + place, P, N, P_PAD, N_PAD)  # gradient of the state after the chunk
    whole = tl.exp(tl.load(sum_ + at + Q - 1) + tl.load(rest_ + at + Q - 1))
    through = tl.sum(tl.sum(X.to(tl.float32) * R.to(tl.float32), 1), 0) * whole
    fade = tl.exp(tl.load(sum_ + at + i) + tl.load(rest_ + at + i))
    seen = tl.dot(C, tl.trans(B), input_precision=PRECISION) * _between(sum_, rest_, at, Q)
    carried = tl.dot(C.to(X.dtype), tl.trans(X), input_precision=PRECISION) * fade[:, None]
    dy = _tile(dy_ + b * dy_b + head * P, first, l, dy_l, P, P_PAD, Q).to(tl.float32)
    if HAS_D:
        D = tl.load(D_ + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    from_carried = tl.sum(dy * carried, 1)
    if HAS_Z:
        z = _tile(z_ + b * z_b + head * P, first, l, z_l, P, P_PAD, Q).to(tl.float32)
        gate = tl.sigmoid(z)
        from_carried = tl.sum(dy * z * gate * carried, 1)
        y = tl.dot((seen * step[None, :]).to(u.dtype), u, carried, input_precision=PRECISION)
        if HAS_D:
            y += D[None, :] * u.to(tl.float32)
        dz = dy * y * gate * (1 + z * (1 - gate))
        _store_tile(dz_ + row, dz, first, l, H * P, P, P_PAD, Q)
        dy = dy * z * gate
    if HAS_D:
        dD = tl.sum(dy * u.to(tl.float32), 0)
        tl.store(dD_ + ((b * chunks + k) * H + head) * P + p, dD, mask=p < P)
    narrow = dy.to(u.dtype)
    pairs = seen * tl.dot(narrow, tl.trans(u), input_precision=PRECISION)  # without the key's step
    as_key = tl.sum(pairs, 0)
    before = tl.where(i[:, None] < i[None, :], 1.0, 0.0)
    paired = tl.dot(pairs * step[None, :], before, input_precision=PRECISION)  # [i, m]: over j < m
    to_end = _to_end(sum_, rest_, at, Q)
    du = tl.dot(B.to(R.dtype), tl.trans(R), input_precision=PRECISION) * to_end[:, None]
    into = tl.sum(u.to(tl.float32) * du, 1)
    du = tl.dot(tl.trans(seen.to(u.dtype)), narrow, du, input_precision=PRECISION)
    du = du * step[:, None]
    if HAS_D:
        du += D[None, :] * dy
    _store_tile(du_ + row, du, first, l, H * P, P, P_PAD, Q)
    tl.store(dstep_ + (b * l + t) * H + head, as_key + into, mask=t < l)
    # what passes m: pairs j < m <= i, the old state to outputs i >= m, inputs j < m to the new one;
    # no pair is added only to be subtracted, so that nothing is left where all is forgotten
    passing = paired + from_carried[:, None]
    later = tl.sum(tl.where(i[:, None] >= i[None, :], passing, 0.0), 0)
    earlier = tl.sum(before * (into * step)[:, None], 0)
    tl.store(ddecay_ + (b * l + t) * H + head, later + earlier + through, mask=t < l)


@triton.jit
def shared_gradients(
    dy_, u_, z_, B_, C_, step_, sum_, rest_, state_, future_, dB_, dC_,
    dy_b, dy_l, u_b, u_l, z_b, z_l, B_b, B_l, C_b, C_l, l, chunks, per,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, P_PAD: tl.constexpr, N_PAD: tl.constexpr,
    Q: tl.constexpr, PRECISION: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C of one chunk, summed over `per` heads."""
    k, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = k.to(tl.int64) * Q
    B = _tile(B_ + b * B_b, first, l, B_l, N, N_PAD, Q)
    C = _tile(C_ + b * C_b, first, l, C_l, N, N_PAD, Q)
    dB = tl.zeros((Q, N_PAD), tl.float32)
    dC = tl.zeros((Q, N_PAD), tl.float32)
    i = tl.arange(0, Q)
    for head in range(group * per, tl.minimum(group * per + per, H)):
        at = ((b * H + head) * chunks + k) * Q
        place = ((b * chunks + k) * H + head) * P * N
        step = tl.load(step_ + at + i)
        u = _tile(u_ + b * u_b + head * P, first, l, u_l, P, P_PAD, Q)
        dy = _gated(dy_, z_, b * dy_b + head * P, b * z_b + head * P, first, l, dy_l, z_l,
                    P, P_PAD, Q, HAS_Z)  # fmt: skip
        agree = tl.dot(dy.to(u.dtype), tl.trans(u), input_precision=PRECISION)
        agree = (agree * _between(sum_, rest_, at, Q) * step[None, :]).to(B.dtype)
        dC = tl.dot(agree, B, dC, input_precision=PRECISION)
        dB = tl.dot(tl.trans(agree), C, dB, input_precision=PRECISION)
        fade = tl.exp(tl.load(sum_ + at + i) + tl.load(rest_ + at + i))
        X = _state(state_ + place, P, N, P_PAD, N_PAD)
        dC = tl.dot((dy * fade[:, None]).to(X.dtype), X, dC, input_precision=PRECISION)
        drive = u.to(tl.float32) * (_to_end(sum_, rest_, at, Q) * step)[:, None]
        R = _state(future_ + place, P, N, P_PAD, N_PAD)
        dB = tl.dot(drive.to(R.dtype), R, dB, input_precision=PRECISION)
    share = (group.to(tl.int64) * tl.num_programs(2) + b) * l * N
    _store_tile(dB_ + share, dB, first, l, N, N, N_PAD, Q)
    _store_tile(dC_ + share, dC, first, l, N, N, N_PAD, Q)
