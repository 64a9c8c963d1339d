"""The shift register's step as a compiled loop: one place of the ring is written, nothing moves."""

from numba import njit

from bmojo_core.ops._arrays import floats, integers


@njit(cache=True, nogil=True)
def write_one(ring_k_at, ring_v_at, k_at, v_at, read_at, w, b, g, places, p):
    """ring_k, ring_v (b, g, m + w, p), the ring last; k, v (b, g, p) go to place read mod w."""
    ring_k, ring_v = floats(ring_k_at, (b, g, places, p)), floats(ring_v_at, (b, g, places, p))
    k, v, read = floats(k_at, (b, g, p)), floats(v_at, (b, g, p)), integers(read_at, (b,))
    for row in range(b):
        place = places - w + read[row] % w
        for head in range(g):
            for i in range(p):
                ring_k[row, head, place, i] = k[row, head, i]
                ring_v[row, head, place, i] = v[row, head, i]
