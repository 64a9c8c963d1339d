"""Checks of the exercises of chapter 1: what a state is."""

from collections.abc import Callable

import numpy as np

from realization import StateSpace


def check_memory_needed(memory_needed: Callable) -> None:
    """Exercise 1.1: ``memory_needed(markov) -> int``, states that an exact memory needs.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    k = np.arange(1, 30)
    shift = np.zeros(30)
    shift[6] = 1.0
    cases = {
        "nothing but M_0": (np.r_[3.0, np.zeros(29)], 0),
        "a decay, M_k = 0.9^k": (np.r_[0.0, 0.9**k], 1),
        "a delay by 6 steps": (shift, 6),
        "the mean of the 5 inputs before the present one": (
            np.r_[0.0, np.full(5, 0.2), np.zeros(24)],
            5,
        ),
        "an oscillation, M_k = cos(k)": (np.r_[0.0, np.cos(k)], 2),
        "a ramp, M_k = k": (np.r_[0.0, k], 2),
    }
    for name, (markov, order) in cases.items():
        answer = memory_needed(markov.reshape(-1, 1, 1))
        hint = ""
        if name == "a delay by 6 steps" and answer == 1:
            hint = (
                " Counting the nonzero parameters is not it: six inputs are on their way at once."
            )
        elif name.startswith("a decay") and answer > 1:
            hint = (
                " Count only singular values above the rounding errors: compare with the largest."
            )
        elif (name == "a delay by 6 steps" and answer == 7) or name.startswith("nothing"):
            hint = " M_0 = D acts within one step and needs no memory: leave it out of H."
        assert answer == order, f"{name}: needs {order} states, your function says {answer}.{hint}"
    two_ports = StateSpace(
        np.diag([0.9, 0.5]), np.eye(2), [[1.0, 1.0], [1.0, 2.0]], np.zeros((2, 2))
    )
    answer = memory_needed(two_ports.markov(20))
    assert answer == 2, (
        f"two inputs and two outputs, order 2: your function says {answer}. With several channels "
        "the entries of H are p x m blocks"
    )
    decay = (0.9**k).reshape(-1, 1, 1)
    opposite = np.concatenate([np.zeros((1, 2, 1)), decay * [[1.0], [-1.0]]])
    answer = memory_needed(opposite)
    assert answer == 1, (
        f"one input, two outputs, M_k = (0.9^k, -0.9^k)': needs 1 state, your function says "
        f"{answer}. Do not add the channels up, they may cancel: the entries of H are p x m blocks"
    )
    for scale in (1e8, 1e-12):
        answer = memory_needed(np.concatenate([np.zeros((1, 1, 1)), scale * decay]))
        assert answer == 1, (
            f"M_k = {scale:.0e} * 0.9^k: needs 1 state as M_k = 0.9^k does, your function says "
            f"{answer}. Rounding errors grow with H: compare with the largest singular value, not "
            "with a fixed number"
        )
    print("OK: the rank of the Hankel matrix, for windows, decays, oscillations and blocks")


def check_realize(realize: Callable) -> None:
    """Exercise 1.2: ``realize(markov, n) -> (A, B, C, D)``, the Ho-Kalman algorithm.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    rng = np.random.default_rng(5)
    for n, m, p in ((1, 1, 1), (3, 1, 1), (4, 2, 3)):
        A = rng.normal(size=(n, n))
        A *= 0.9 / np.abs(np.linalg.eigvals(A)).max()
        parts = A, rng.normal(size=(n, m)), rng.normal(size=(p, n)), rng.normal(size=(p, m))
        markov = StateSpace(*parts).markov(24)
        answer = [np.asarray(x, dtype=float) for x in realize(markov, n)]
        sizes = [(n, n), (n, m), (p, n), (p, m)]
        for name, part, size in zip("ABCD", answer, sizes):
            assert part.shape == size, (
                f"n={n}, m={m}, p={p}: {name} must have shape {size}, it has {part.shape}"
            )
        found = StateSpace(*answer).markov(24)
        assert np.allclose(found[0], markov[0]), "D must be markov[0]"
        assert np.allclose(found[1], markov[1], atol=1e-8), (
            "C B must be M_1: take C from the first block row of O and B from the first block "
            "column of R"
        )
        assert np.allclose(found[2], markov[2], atol=1e-8), (
            "M_1 is right and M_2 = C A B is not: A solves O[:-p] A = O[p:], a shift by one block "
            "of p rows (not by one row)"
        )
        assert np.allclose(found, markov, atol=1e-7), (
            f"n={n}, m={m}, p={p}: later Markov parameters are off by "
            f"{np.abs(found - markov).max():.1e}"
        )
    print("OK: every Markov parameter comes back, for one channel and for several")
