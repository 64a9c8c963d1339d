"""Algorithm 1, compiled: step 4 (insert if larger than the smallest) for sequences and for one
token, step 3 (innovation) for one token."""

from __future__ import annotations

import numpy as np
from numba import njit

from bmojo_core.ops._arrays import floats, integers


@njit(cache=True, nogil=True)
def insert_in_order(scores, chunk, index, valid):
    """Write the memory before every chunk into zeroed ``index`` and ``valid``.

    scores (b, l), index (b, c, k) int64, valid (b, c, k) bool. One thread: 64 sequences of 256
    tokens take about a millisecond, less than waking a second thread.
    """
    b, l = scores.shape
    k = index.shape[2]
    for row in range(b):
        position = np.zeros(k, np.int64)  # slots in order of position
        score = np.empty(k, scores.dtype)
        size = 0
        smallest = 0  # the slot that leaves next
        for t in range(l):
            if t % chunk == 0:
                i = t // chunk
                index[row, i, :size] = position[:size]
                valid[row, i, :size] = True
            e = scores[row, t]
            if k == 0 or not e > -np.inf or (size == k and not e > score[smallest]):
                continue
            if size == k:
                for slot in range(smallest, k - 1):
                    position[slot] = position[slot + 1]
                    score[slot] = score[slot + 1]
                size -= 1
            position[size] = t
            score[size] = e
            size += 1
            if size == k:
                smallest = 0
                for slot in range(1, k):
                    if score[slot] <= score[smallest]:  # among equals the youngest leaves
                        smallest = slot


@njit(cache=True, nogil=True)
def innovation_step(y_at, past_at, e_at, b, taps, d):
    """Squared error of the mean of past (b, taps, d) as a prediction of y (b, d); writes e (b,).

    Summed in double precision.
    """
    y, e = floats(y_at, (b, d)), floats(e_at, (b,))
    past = floats(past_at, (b, taps, d))
    for row in range(b):
        total = 0.0
        for c in range(d):
            seen = past[row, 0, c]
            for j in range(1, taps):
                seen += past[row, j, c]
            error = float(y[row, c] - seen / np.float32(taps))
            total += error * error
        e[row] = total / d


@njit(cache=True, nogil=True)
def insert_one(
    best_k_at,
    best_v_at,
    best_score_at,
    best_position_at,
    k_at,
    v_at,
    score_at,
    position_at,
    b,
    m,
    s,
):
    """One token a row replaces the smallest score if it is larger; of equals the youngest leaves.

    best_k, best_v (b, m, s); best_score, best_position (b, m); k, v (b, s); score, position (b,).
    Written in place.
    """
    best_k, best_v = floats(best_k_at, (b, m, s)), floats(best_v_at, (b, m, s))
    best_score, best_position = floats(best_score_at, (b, m)), integers(best_position_at, (b, m))
    k, v = floats(k_at, (b, s)), floats(v_at, (b, s))
    score, position = floats(score_at, (b,)), integers(position_at, (b,))
    for row in range(b):
        smallest = 0
        for slot in range(1, m):
            there, least = best_score[row, slot], best_score[row, smallest]
            younger = best_position[row, slot] > best_position[row, smallest]
            if there < least or (there == least and younger):
                smallest = slot
        if score[row] > best_score[row, smallest]:
            best_k[row, smallest] = k[row]
            best_v[row, smallest] = v[row]
            best_score[row, smallest] = score[row]
            best_position[row, smallest] = position[row]
