"""The checks of chapter 3 accept right answers and say what is wrong with plausible wrong ones."""

import numpy as np
import pytest
from checks.ch03 import check_ma_bounds, check_riccati_iteration


def iterate(step):
    def riccati_iteration(A, C, G, L0, k):
        P = np.zeros_like(A)
        for _ in range(k):
            P = step(A, C, G, L0, P)
        return P

    return riccati_iteration


def right(A, C, G, L0, P):
    gain = G - A @ P @ C.T
    return A @ P @ A.T + gain @ np.linalg.solve(L0 - C @ P @ C.T, gain.T)


def without_transition(A, C, G, L0, P):
    gain = G - A @ P @ C.T
    return gain @ np.linalg.solve(L0 - C @ P @ C.T, gain.T)


def unweighted(A, C, G, L0, P):
    gain = G - A @ P @ C.T
    return A @ P @ A.T + gain @ gain.T


def wrong_sign(A, C, G, L0, P):
    gain = G + A @ P @ C.T
    return A @ P @ A.T + gain @ np.linalg.solve(L0 + C @ P @ C.T, gain.T)


def test_right_answers_pass(capsys):
    check_ma_bounds(lambda theta, s: (min(theta**2, 1) * s, max(theta**2, 1) * s))
    check_riccati_iteration(iterate(right))
    assert capsys.readouterr().out.count("OK") == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda theta, s: (theta**2 * s, s), "swapped"),
        (lambda theta, s: (s, theta**2 * s), "swapped"),
        (lambda theta, s: (min(theta**2, 1), max(theta**2, 1)), "scale with sigma2"),
        (lambda theta, s: (0.0, (1 + theta**2) * s), "determinant"),
        (lambda theta, s: (min(theta**2, 1) * s, (1 + theta**2) * s), "other root"),
    ],
)
def test_wrong_bounds_are_explained(answer, message):
    with pytest.raises(AssertionError, match=message):
        check_ma_bounds(answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (iterate(without_transition), "what was known must move on"),
        (iterate(unweighted), "inverse variance"),
        (iterate(wrong_sign), "trace"),
        (lambda A, C, G, L0, k: G @ G.T, "P_0 must be zero"),
        (lambda A, C, G, L0, k: 0.0, "shape"),
    ],
)
def test_wrong_recursions_are_explained(answer, message):
    with pytest.raises(AssertionError, match=message):
        check_riccati_iteration(answer)
