"""Checks of the exercises of chapter 5: attention is a nilpotent system."""

from collections.abc import Callable

import numpy as np


def check_down_shift(down_shift: Callable) -> None:
    """Exercise 5.1: ``down_shift(N, s) -> (A, W)``, a register with the newest token first.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    N, s = 4, 2
    A, W = (np.asarray(x, dtype=float) for x in down_shift(N, s))
    assert A.shape == (N * s, N * s), f"A must be ({N * s}, {N * s}) for N=4, s=2; it is {A.shape}"
    assert W.shape == (N * s, s), (
        f"W writes s numbers into the state: ({N * s}, {s}), not {W.shape}"
    )
    tokens = np.random.default_rng(0).normal(size=(9, s))
    x = np.zeros(N * s)
    for token in tokens:
        x = A @ x + W @ token
    blocks = x.reshape(N, s)
    if np.allclose(blocks, tokens[-N:]):
        raise AssertionError(
            "your register has the oldest token first: that is the up-shift of the text. "
            "Here block 0 must hold the newest token."
        )
    assert np.allclose(blocks[0], tokens[-1]), (
        "after a token is read, block 0 must hold it: W must write into block 0"
    )
    assert np.allclose(blocks, tokens[: -N - 1 : -1]), (
        "block j must hold the token read j steps before the newest: A must move block j to j + 1"
    )
    power = np.linalg.matrix_power(A, N)
    assert not power.any(), "A^N must be zero: the oldest block has to fall out, not wrap around"
    print("OK: a block down-shift, nilpotent of order N, newest token first")


def check_weighted_sliding_sum(weighted_sliding_sum: Callable) -> None:
    """Exercise 5.2: ``weighted_sliding_sum(lam, N) -> (A, W)``, state (S, register oldest first).

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    lam, N = 0.8, 5
    A, W = (np.asarray(x, dtype=float) for x in weighted_sliding_sum(lam, N))
    W = W.reshape(-1)
    assert A.shape == (N + 1, N + 1), (
        f"the state is (S, o_1 .. o_N): A must be 6 x 6, not {A.shape}"
    )
    assert W.shape == (N + 1,), f"W must have {N + 1} entries; it has {W.shape}"
    o = np.random.default_rng(1).normal(size=20)
    x, sums = np.zeros(N + 1), []
    for value in o:
        x = A @ x + W * value
        sums.append(x[0])
    want = [sum(lam**j * o[t - j] for j in range(min(N, t + 1))) for t in range(20)]
    early, late = np.allclose(sums[:N], want[:N]), np.allclose(sums, want)
    assert early, "S must weigh the newest value by 1 and a value j steps older by lam^j"
    assert late, (
        "right until the window is full, wrong after: a value that leaves has by then been "
        "multiplied by lam N times, so subtract lam^N times the oldest"
    )
    assert abs(A[0, 0] - lam) < 1e-12, (
        "S must be carried on with the factor lam: only then does an error in S fade"
    )
    error = np.eye(N + 1)[0]
    for _ in range(60):
        error = A @ error
    assert np.abs(error).max() < 1e-5, "an error in S must fade as lam^t"
    print("OK: the weighted window is exact, and an error in the sum fades as lam^t")
