"""Checks of the exercises of chapter 2: canonical forms and minimality."""

from collections.abc import Callable

import numpy as np


def check_companion(companion: Callable) -> None:
    """Exercise 2.1: ``companion(a, b) -> (A, B, C)`` for W(z) = b(z) / a(z), a monic.

    `a` holds a_0 .. a_{n-1} and `b` holds b_0 .. b_{n-1}, constant terms first.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    rng = np.random.default_rng(3)
    for n in (1, 2, 4):
        poles = rng.uniform(-0.9, 0.9, n)
        a, b = np.poly(poles)[:0:-1], rng.normal(size=n)
        A, B, C = (np.asarray(x, dtype=float) for x in companion(a, b))
        assert A.shape == (n, n) and B.shape == (n, 1) and C.shape == (1, n), (
            f"n={n}: A, B, C must have shapes {(n, n)}, {(n, 1)}, {(1, n)}; "
            f"they have {A.shape}, {B.shape}, {C.shape}"
        )
        assert np.array_equal(A[:-1], np.eye(n, k=1)[:-1]), (
            "all rows of A but the last shift: identities above the diagonal"
        )
        if n > 1 and np.allclose(A[-1], a):
            raise AssertionError("the last row is minus the coefficients: z^n = -a_0 - a_1 z - ..")
        if n > 1 and np.allclose(A[-1], -a[::-1]):
            raise AssertionError(
                "the last row has the right numbers in reverse: a_0 belongs to the oldest state, "
                "which comes first"
            )
        assert np.allclose(A[-1], -a), f"the last row of A should be {-a}, it is {A[-1]}"
        assert np.array_equal(B[:, 0], np.eye(n)[-1]), "the input enters at the last state only"
        z = 1.3 * np.exp(0.7j)
        value = (C @ np.linalg.solve(z * np.eye(n) - A, B))[0, 0]
        expected = np.polyval(b[::-1], z) / np.polyval(np.r_[1.0, a[::-1]], z)
        assert np.isclose(value, expected), (
            f"A and B are right; C (z I - A)^-1 B is {value:.4f} at z = {z:.2f} and b(z) / a(z) is "
            f"{expected:.4f}: with states 1, z, z^2, .. over a(z), C is just b_0 .. b_(n-1)"
        )
    zero_row, _, _ = companion(np.zeros(4), np.ones(4))
    assert not np.linalg.matrix_power(np.asarray(zero_row, dtype=float), 4).any(), (
        "with a = 0 the form must be a window: A^n = 0"
    )
    print("OK: the companion form; with a zero last row it is a window")


def check_reached(reached: Callable) -> None:
    """Exercise 2.2: ``reached(A, B) -> list of bool``, for each eigenvalue in numpy's order.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    rng = np.random.default_rng(4)
    T = rng.normal(size=(4, 4))
    inverse = np.linalg.inv(T)
    modes = np.diag([0.9, 0.5, -0.3, 0.1])
    B = np.array([[1.0], [0.0], [2.0], [0.0]])
    cases = {
        "a diagonal A": (modes, B),
        "the same system in another basis": (T @ modes @ inverse, T @ B),
        "an oscillator": (np.array([[0.6, 0.8], [-0.8, 0.6]]), np.array([[1.0], [0.0]])),
        "an oscillator without input, beside a mode with one": (
            np.array([[0.6, 0.7, 0.0], [-0.7, 0.6, 0.0], [0.0, 0.0, 0.5]]),
            [[0.0], [0.0], [1.0]],
        ),
        "a Jordan block, input at its end": (np.array([[0.5, 1.0], [0.0, 0.5]]), [[0.0], [1.0]]),
        "a Jordan block, input at its start": (np.array([[0.5, 1.0], [0.0, 0.5]]), [[1.0], [0.0]]),
        "two equal modes, one input": (0.5 * np.eye(2), np.ones((2, 1))),
        "two equal modes, two inputs": (0.5 * np.eye(2), np.eye(2)),
    }
    expected = {
        "a diagonal A": {0.9: True, 0.5: False, -0.3: True, 0.1: False},
        "the same system in another basis": {0.9: True, 0.5: False, -0.3: True, 0.1: False},
        "an oscillator": True,
        "an oscillator without input, beside a mode with one": {
            0.6 + 0.7j: False,
            0.6 - 0.7j: False,
            0.5: True,
        },
        "a Jordan block, input at its end": True,
        "a Jordan block, input at its start": False,
        "two equal modes, one input": False,
        "two equal modes, two inputs": True,
    }
    for name, (A, B) in cases.items():
        A, B = np.array(A, dtype=float), np.array(B, dtype=float)
        answer = [bool(x) for x in reached(A, B)]
        lam = np.linalg.eigvals(A)
        assert len(answer) == len(lam), f"{name}: one answer for each of the {len(lam)} eigenvalues"
        truth = expected[name]
        for value, said in zip(lam, answer):
            right = truth
            if isinstance(truth, dict):
                right = truth[min(truth, key=lambda known, v=value: abs(known - v))]
            hint = ""
            if name.startswith("the same"):
                hint = " Zero rows of B mean something in modal coordinates only; rank does not."
            elif name.startswith("an oscillator without"):
                hint = (
                    " Take the eigenvalue as it is, complex: its real part alone is no eigenvalue,"
                    " and lam I - A has full rank there whatever B is."
                )
            elif name.startswith("two equal modes, one"):
                hint = " Both states get the same input and never differ: [lam I - A, B] has rank 1"
            elif name.startswith("a Jordan"):
                hint = " Ask for the rank of [lam I - A, B], not for the entries of B."
            assert said == right, (
                f"{name}: the mode {value:.2f} is {'' if right else 'not '}reached, "
                f"your function says {said}.{hint}"
            )
    print("OK: each mode is asked by itself, in every basis, repeated modes too")
