r"""Triton kernels of the window-and-memory attention (see ``gpu.py`` for the equations).

Names inside a kernel: a program owns ROWS rows (queries i, or keys j, or memory tokens) and walks
over blocks of COLUMNS columns; P_PAD is the head width rounded up to a power of two. Scores are in
units of log 2: ``scale2 = scale log2(e)``, and ``logsum`` is the base-2 logarithm of the softmax's
denominator, +inf where a query sees nothing (so that its weights are exactly 0).

Every walk is cut in three: columns at the near edge (masked), columns that all rows see (no mask),
columns at the far edge (masked). Memory tokens come last, in whole blocks and a rest of TAIL
columns: 72 tokens are 64 + 16 and not 2 x 64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _wide_id(axis: tl.constexpr):
    """Which program this is, in 64 bits: multiplied by a stride it may pass 2^31."""
    return tl.program_id(axis).to(tl.int64)


@triton.jit
def _tile(base, first, count, stride, P: tl.constexpr, P_PAD: tl.constexpr, SIZE: tl.constexpr):
    """Rows first .. first + SIZE of a (count, P) matrix, zeros outside; row * stride in 64 bits."""
    row = first + tl.arange(0, SIZE)
    column = tl.arange(0, P_PAD)
    inside = row[:, None] < count
    if P != P_PAD:
        inside = inside & (column[None, :] < P)
    at = row.to(tl.int64) * stride
    return tl.load(base + at[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store_tile(
    base, value, first, count, stride, P: tl.constexpr, P_PAD: tl.constexpr, SIZE: tl.constexpr
):
    row = first + tl.arange(0, SIZE)
    column = tl.arange(0, P_PAD)
    inside = (row[:, None] < count) & (column[None, :] < P)
    to = base + (row.to(tl.int64) * stride)[:, None] + column[None, :]
    tl.store(to, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _edges(first, last, near_full, far_full, STEP: tl.constexpr):
    """Cut first .. last into [first, a) masked, [a, z) seen by all rows, [z, last) masked.

    Columns near_full .. far_full are those that all rows see; a and z lie whole steps from first.
    """
    a = first + (tl.maximum(near_full - first, 0) + STEP - 1) // STEP * STEP
    z = a + tl.maximum(far_full - a, 0) // STEP * STEP
    return tl.minimum(a, last), tl.minimum(z, last)


@triton.jit
def _window_mask(i, j, r, length, window, valid, HAS_VALID: tl.constexpr):
    """visible[i, j] = i + r - window < j <= i + r, and key j is not padding."""
    seen = (j[None, :] <= i[:, None] + r) & (j[None, :] > i[:, None] + r - window)
    if HAS_VALID:
        key = tl.load(valid + j, mask=j < length, other=0) != 0
        seen = seen & key[None, :]
    return seen


@triton.jit
def _softmax_step(
    q, k, v, seen, top, total, out, scale2, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """Take one block of keys into the running softmax (top: maximum, total: denominator)."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    anchor = new_top
    if MASKED:  # a row that has seen nothing yet
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.math.exp2(s - anchor[:, None])
    fade = tl.math.exp2(top - anchor)
    total = total * fade + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * fade[:, None], input_precision=PRECISION)
    return new_top, total, out


@triton.jit
def _walk_forward(
    q, k_base, v_base, k_l, v_l, valid, i, r, first, last, length, window, top, total, out, scale2,
    MASKED: tl.constexpr, HAS_VALID: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for j0 in range(first, last, COLUMNS):
        k = _tile(k_base, j0, length, k_l, P, P_PAD, COLUMNS)
        v = _tile(v_base, j0, length, v_l, P, P_PAD, COLUMNS)
        seen = i[:, None] >= 0
        if MASKED:
            j = j0 + tl.arange(0, COLUMNS)
            seen = _window_mask(i, j, r, length, window, valid, HAS_VALID)
        top, total, out = _softmax_step(q, k, v, seen, top, total, out, scale2, MASKED, PRECISION)
    return top, total, out


@triton.jit
def _memory_mask(i, t, m, known, HAS_MEM_VALID: tl.constexpr):
    """Every query sees memory token t, unless its place in the memory is empty."""
    here = t < m
    if HAS_MEM_VALID:
        here = tl.load(known + t, mask=here, other=0) != 0
    return (i[:, None] >= 0) & here[None, :]


@triton.jit
def _walk_memory_forward(
    q, k_base, v_base, k_m, v_m, known, i, first, last, m, top, total, out, scale2,
    HAS_MEM_VALID: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for t0 in range(first, last, STEP):
        k = _tile(k_base, t0, m, k_m, P, P_PAD, STEP)
        v = _tile(v_base, t0, m, v_m, P, P_PAD, STEP)
        seen = _memory_mask(i, t0 + tl.arange(0, STEP), m, known, HAS_MEM_VALID)
        top, total, out = _softmax_step(q, k, v, seen, top, total, out, scale2, True, PRECISION)
    return top, total, out


@triton.jit
def forward(
    q_, k_, v_, mem_k_, mem_v_, mem_valid_, key_valid_, out_, logsum_,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    mk_b, mk_c, mk_m, mk_h, mv_b, mv_c, mv_m, mv_h, o_b, o_l, o_h,
    l, length, m, window, chunk, per_chunk, scale2,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_MEM: tl.constexpr, HAS_MEM_VALID: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: its window, then its chunk's memory."""
    block, head, batch = tl.program_id(0), _wide_id(1), _wide_id(2)
    c = block // per_chunk
    i0 = c * chunk + block % per_chunk * ROWS
    i1 = tl.minimum(tl.minimum(i0 + ROWS, (c + 1) * chunk), l)
    if i0 >= i1:
        return
    r, g = length - l, head // (H // G)
    i = i0 + tl.arange(0, ROWS)
    q = _tile(q_ + batch * q_b + head * q_h, i0, i1, q_l, P, P_PAD, ROWS)
    k_base, v_base = k_ + batch * k_b + g * k_h, v_ + batch * v_b + g * v_h
    valid = key_valid_ + batch * length if HAS_VALID else key_valid_
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, P_PAD], tl.float32)

    first, last = tl.maximum(i0 + r - window + 1, 0), i1 + r
    a, z = _edges(first, last, tl.maximum(i0 + ROWS + r - window, 0), i0 + r + 1, COLUMNS)
    top, total, out = _walk_forward(
        q, k_base, v_base, k_l, v_l, valid, i, r, first, a, length, window, top, total, out,
        scale2, True, HAS_VALID, P, P_PAD, COLUMNS, PRECISION,
    )  # fmt: skip
    top, total, out = _walk_forward(
        q, k_base, v_base, k_l, v_l, valid, i, r, a, z, length, window, top, total, out,
        scale2, HAS_VALID, HAS_VALID, P, P_PAD, COLUMNS, PRECISION,
    )  # fmt: skip
    top, total, out = _walk_forward(
        q, k_base, v_base, k_l, v_l, valid, i, r, z, last, length, window, top, total, out,
        scale2, True, HAS_VALID, P, P_PAD, COLUMNS, PRECISION,
    )  # fmt: skip
    if HAS_MEM:
        mem_k = mem_k_ + batch * mk_b + c.to(tl.int64) * mk_c + g * mk_h
        mem_v = mem_v_ + batch * mv_b + c.to(tl.int64) * mv_c + g * mv_h
        known = mem_valid_
        if HAS_MEM_VALID:
            known += (batch * (tl.num_programs(0) // per_chunk) + c) * m
        whole = m // COLUMNS * COLUMNS
        top, total, out = _walk_memory_forward(
            q, mem_k, mem_v, mk_m, mv_m, known, i, 0, whole, m, top, total, out, scale2,
            HAS_MEM_VALID, P, P_PAD, COLUMNS, PRECISION,
        )  # fmt: skip
        top, total, out = _walk_memory_forward(
            q, mem_k, mem_v, mk_m, mv_m, known, i, whole, m, m, top, total, out, scale2,
            HAS_MEM_VALID, P, P_PAD, TAIL, PRECISION,
        )  # fmt: skip

    sees = total > 0
    out = out / tl.where(sees, total, 1.0)[:, None]
    _store_tile(out_ + batch * o_b + head * o_h, out, i0, i1, o_l, P, P_PAD, ROWS)
    logsum = tl.where(sees, top + tl.math.log2(tl.where(sees, total, 1.0)), float("inf"))
    tl.store(logsum_ + (batch * H + head) * l + i, logsum, mask=i < i1)


@triton.jit
def _query_step(
    q, k, v, seen, dout, logsum, dot, dq, scale2, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    p = tl.math.exp2(s - logsum[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - dot[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _walk_queries(
    q, k_base, v_base, k_l, v_l, valid, i, r, first, last, length, window, dout, logsum, dot, dq,
    scale2, MASKED: tl.constexpr, HAS_VALID: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for j0 in range(first, last, COLUMNS):
        k = _tile(k_base, j0, length, k_l, P, P_PAD, COLUMNS)
        v = _tile(v_base, j0, length, v_l, P, P_PAD, COLUMNS)
        seen = i[:, None] >= 0
        if MASKED:
            j = j0 + tl.arange(0, COLUMNS)
            seen = _window_mask(i, j, r, length, window, valid, HAS_VALID)
        dq = _query_step(q, k, v, seen, dout, logsum, dot, dq, scale2, MASKED, PRECISION)
    return dq


@triton.jit
def _walk_memory_queries(
    q, k_base, v_base, k_m, v_m, known, i, first, last, m, dout, logsum, dot, dq, scale2,
    HAS_MEM_VALID: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for t0 in range(first, last, STEP):
        k = _tile(k_base, t0, m, k_m, P, P_PAD, STEP)
        v = _tile(v_base, t0, m, v_m, P, P_PAD, STEP)
        seen = _memory_mask(i, t0 + tl.arange(0, STEP), m, known, HAS_MEM_VALID)
        dq = _query_step(q, k, v, seen, dout, logsum, dot, dq, scale2, True, PRECISION)
    return dq


@triton.jit
def query_gradients(
    q_, k_, v_, mem_k_, mem_v_, mem_valid_, key_valid_, dout_, out_, logsum_, dot_, dq_,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    mk_b, mk_c, mk_m, mk_h, mv_b, mv_c, mv_m, mv_h, do_b, do_l, do_h, o_b, o_l, o_h,
    dq_b, dq_l, dq_h,
    l, length, m, window, chunk, per_chunk, scale2, scale,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_MEM: tl.constexpr, HAS_MEM_VALID: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """D and dq of one block of queries of one head, over the same columns as ``forward``."""
    block, head, batch = tl.program_id(0), _wide_id(1), _wide_id(2)
    c = block // per_chunk
    i0 = c * chunk + block % per_chunk * ROWS
    i1 = tl.minimum(tl.minimum(i0 + ROWS, (c + 1) * chunk), l)
    if i0 >= i1:
        return
    r, g = length - l, head // (H // G)
    i = i0 + tl.arange(0, ROWS)
    q = _tile(q_ + batch * q_b + head * q_h, i0, i1, q_l, P, P_PAD, ROWS)
    dout = _tile(dout_ + batch * do_b + head * do_h, i0, i1, do_l, P, P_PAD, ROWS)
    out = _tile(out_ + batch * o_b + head * o_h, i0, i1, o_l, P, P_PAD, ROWS)
    dot = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    row = (batch * H + head) * l + i
    tl.store(dot_ + row, dot, mask=i < i1)
    logsum = tl.load(logsum_ + row, mask=i < i1, other=float("inf"))
    k_base, v_base = k_ + batch * k_b + g * k_h, v_ + batch * v_b + g * v_h
    valid = key_valid_ + batch * length if HAS_VALID else key_valid_
    dq = tl.zeros([ROWS, P_PAD], tl.float32)

    first, last = tl.maximum(i0 + r - window + 1, 0), i1 + r
    a, z = _edges(first, last, tl.maximum(i0 + ROWS + r - window, 0), i0 + r + 1, COLUMNS)
    dq = _walk_queries(
        q, k_base, v_base, k_l, v_l, valid, i, r, first, a, length, window, dout, logsum, dot, dq,
        scale2, True, HAS_VALID, P, P_PAD, COLUMNS, PRECISION,
    )  # fmt: skip
    dq = _walk_queries(
        q, k_base, v_base, k_l, v_l, valid, i, r, a, z, length, window, dout, logsum, dot, dq,
        scale2, HAS_VALID, HAS_VALID, P, P_PAD, COLUMNS, PRECISION,
    )  # fmt: skip
    dq = _walk_queries(
        q, k_base, v_base, k_l, v_l, valid, i, r, z, last, length, window, dout, logsum, dot, dq,
        scale2, True, HAS_VALID, P, P_PAD, COLUMNS, PRECISION,
    )  # fmt: skip
    if HAS_MEM:
        mem_k = mem_k_ + batch * mk_b + c.to(tl.int64) * mk_c + g * mk_h
        mem_v = mem_v_ + batch * mv_b + c.to(tl.int64) * mv_c + g * mv_h
        known = mem_valid_
        if HAS_MEM_VALID:
            known += (batch * (tl.num_programs(0) // per_chunk) + c) * m
        whole = m // COLUMNS * COLUMNS
        dq = _walk_memory_queries(
            q, mem_k, mem_v, mk_m, mv_m, known, i, 0, whole, m, dout, logsum, dot, dq, scale2,
            HAS_MEM_VALID, P, P_PAD, COLUMNS, PRECISION,
        )  # fmt: skip
        dq = _walk_memory_queries(
            q, mem_k, mem_v, mk_m, mv_m, known, i, whole, m, m, dout, logsum, dot, dq, scale2,
            HAS_MEM_VALID, P, P_PAD, TAIL, PRECISION,
        )  # fmt: skip
    _store_tile(dq_ + batch * dq_b + head * dq_h, dq * scale, i0, i1, dq_l, P, P_PAD, ROWS)


@triton.jit
def _key_step(
    q, k, v, seen, dout, logsum, dot, dk, dv, scale2,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys are the rows here: everything transposed."""
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
    p = tl.math.exp2(s - logsum[None, :])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - dot[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _walk_keys(
    k, v, q_base, do_base, q_l, do_l, logsum, dot, keep, j, r, first, last, l, window, dk, dv,
    scale2, MASKED: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for i0 in range(first, last, COLUMNS):
        q = _tile(q_base, i0, last, q_l, P, P_PAD, COLUMNS)
        dout = _tile(do_base, i0, last, do_l, P, P_PAD, COLUMNS)
        i = i0 + tl.arange(0, COLUMNS)
        row_logsum = tl.load(logsum + i, mask=i < last, other=float("inf"))
        row_dot = tl.load(dot + i, mask=i < last, other=0.0)
        seen = keep[:, None] & (i[None, :] < last)
        if MASKED:
            seen = seen & (j[:, None] <= i[None, :] + r) & (j[:, None] > i[None, :] + r - window)
        dk, dv = _key_step(
            q, k, v, seen, dout, row_logsum, row_dot, dk, dv, scale2, MASKED, PRECISION
        )
    return dk, dv


@triton.jit
def key_gradients(
    q_, k_, v_, key_valid_, dout_, logsum_, dot_, dk_, dv_,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, do_b, do_l, do_h, dk_b, dk_l, dk_h,
    l, length, m, window, chunk, scale2, scale,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_MEM: tl.constexpr, HAS_MEM_VALID: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, over the queries of all heads that share them."""
    j0, g, batch = tl.program_id(0) * ROWS, _wide_id(1), _wide_id(2)
    r = length - l
    j = j0 + tl.arange(0, ROWS)
    k = _tile(k_ + batch * k_b + g * k_h, j0, length, k_l, P, P_PAD, ROWS)
    v = _tile(v_ + batch * v_b + g * v_h, j0, length, v_l, P, P_PAD, ROWS)
    keep = j < length
    if HAS_VALID:
        keep = tl.load(key_valid_ + batch * length + j, mask=j < length, other=0) != 0
    dk = tl.zeros([ROWS, P_PAD], tl.float32)
    dv = tl.zeros([ROWS, P_PAD], tl.float32)
    first = tl.maximum(j0 - r, 0)
    last = tl.minimum(j0 + ROWS - 1 - r + window, l)
    far_full = tl.minimum(j0 - r + window, l)
    a, z = _edges(first, last, tl.maximum(j0 + ROWS - 1 - r, 0), far_full, COLUMNS)
    for x in range(H // G):
        head = g * (H // G) + x
        q_base, do_base = q_ + batch * q_b + head * q_h, dout_ + batch * do_b + head * do_h
        logsum, dot = logsum_ + (batch * H + head) * l, dot_ + (batch * H + head) * l
        dk, dv = _walk_keys(
            k, v, q_base, do_base, q_l, do_l, logsum, dot, keep, j, r, first, a, l, window,
            dk, dv, scale2, True, P, P_PAD, COLUMNS, PRECISION,
        )  # fmt: skip
        dk, dv = _walk_keys(
            k, v, q_base, do_base, q_l, do_l, logsum, dot, keep, j, r, a, z, l, window,
            dk, dv, scale2, HAS_VALID, P, P_PAD, COLUMNS, PRECISION,
        )  # fmt: skip
        dk, dv = _walk_keys(
            k, v, q_base, do_base, q_l, do_l, logsum, dot, keep, j, r, z, last, l, window,
            dk, dv, scale2, True, P, P_PAD, COLUMNS, PRECISION,
        )  # fmt: skip
    at = batch * dk_b + g * dk_h
    _store_tile(dk_ + at, dk * scale, j0, length, dk_l, P, P_PAD, ROWS)
    _store_tile(dv_ + at, dv, j0, length, dk_l, P, P_PAD, ROWS)


@triton.jit
def memory_gradients(
    q_, mem_k_, mem_v_, mem_valid_, dout_, logsum_, dot_, dmem_k_, dmem_v_,
    q_b, q_l, q_h, mk_b, mk_c, mk_m, mk_h, mv_b, mv_c, mv_m, mv_h,
    do_b, do_l, do_h, dm_b, dm_c, dm_m, dm_h,
    l, length, m, window, chunk, per_chunk, scale2, scale,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_MEM: tl.constexpr, HAS_MEM_VALID: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of a chunk's memory tokens, over all queries of the chunk."""
    block, g, batch = tl.program_id(0), _wide_id(1), _wide_id(2)
    c, t0 = block // per_chunk, block % per_chunk * ROWS
    chunks = tl.num_programs(0) // per_chunk
    t = t0 + tl.arange(0, ROWS)
    k = _tile(mem_k_ + batch * mk_b + c.to(tl.int64) * mk_c + g * mk_h, t0, m, mk_m, P, P_PAD, ROWS)
    v = _tile(mem_v_ + batch * mv_b + c.to(tl.int64) * mv_c + g * mv_h, t0, m, mv_m, P, P_PAD, ROWS)
    keep = t < m
    if HAS_MEM_VALID:
        keep = tl.load(mem_valid_ + (batch * chunks + c) * m + t, mask=t < m, other=0) != 0
    dk = tl.zeros([ROWS, P_PAD], tl.float32)
    dv = tl.zeros([ROWS, P_PAD], tl.float32)
    first, last = c * chunk, tl.minimum((c + 1) * chunk, l)
    for x in range(H // G):
        head = g * (H // G) + x
        q_base, do_base = q_ + batch * q_b + head * q_h, dout_ + batch * do_b + head * do_h
        logsum, dot = logsum_ + (batch * H + head) * l, dot_ + (batch * H + head) * l
        # every query of the chunk sees every memory token: a window that no row leaves
        dk, dv = _walk_keys(
            k, v, q_base, do_base, q_l, do_l, logsum, dot, keep, t * 0, l, first, last, l,
            2 * l + 1, dk, dv, scale2, True, P, P_PAD, COLUMNS, PRECISION,
        )  # fmt: skip
    at = batch * dm_b + c.to(tl.int64) * dm_c + g * dm_h
    _store_tile(dmem_k_ + at, dk * scale, t0, m, dm_m, P, P_PAD, ROWS)
    _store_tile(dmem_v_ + at, dv, t0, m, dm_m, P, P_PAD, ROWS)
