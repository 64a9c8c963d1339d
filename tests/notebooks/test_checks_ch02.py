"""The checks of chapter 2 accept right answers and explain plausible wrong ones."""

import numpy as np
import pytest
from checks.ch02 import check_companion, check_reached


def companion(a, b):
    n = len(a)
    A = np.eye(n, k=1)
    A[-1] = -np.asarray(a)
    return A, np.eye(n)[:, -1:], np.asarray(b, dtype=float)[None, :]


def reached(A, B):
    n = len(A)
    return [
        np.linalg.matrix_rank(np.hstack([lam * np.eye(n) - A, B]), tol=1e-8) == n
        for lam in np.linalg.eigvals(A)
    ]


def test_right_answers_pass(capsys):
    check_companion(companion)
    check_reached(reached)
    assert capsys.readouterr().out.count("OK") == 2


def plus_sign(a, b):
    A, B, C = companion(a, b)
    A[-1] *= -1 if len(a) > 1 else 1
    return A, B, C


def reversed_row(a, b):
    A, B, C = companion(a, b)
    A[-1] = A[-1, ::-1].copy()
    return A, B, C


def reversed_output(a, b):
    A, B, C = companion(a, b)
    return A, B, C[:, ::-1]


def input_first(a, b):
    A, _B, C = companion(a, b)
    return A, np.eye(len(a))[:, :1], C


def transposed(a, b):
    A, B, C = companion(a, b)
    return A.T, C.T, B.T


@pytest.mark.parametrize(
    "wrong, word",
    [
        (plus_sign, "minus the coefficients"),
        (reversed_row, "in reverse"),
        (reversed_output, "C is just"),
        (input_first, "at the last state"),
        (transposed, "above the diagonal|last state"),
    ],
)
def test_wrong_companions_are_explained(wrong, word):
    with pytest.raises(AssertionError, match=word):
        check_companion(wrong)


def rows_of_B(A, B):
    return [bool(row.any()) for row in B]


def once_for_all(A, B):
    n = len(A)
    R = np.hstack([np.linalg.matrix_power(A, k) @ B for k in range(n)])
    return [np.linalg.matrix_rank(R) == n] * n


def eigenvectors(A, B):
    W = np.linalg.inv(np.linalg.eig(A)[1])
    return [np.abs(w @ B).max() > 1e-8 for w in W]


def real_part(A, B):
    n = len(A)
    return [
        np.linalg.matrix_rank(np.hstack([lam.real * np.eye(n) - A, B]), tol=1e-8) == n
        for lam in np.linalg.eigvals(A)
    ]


def too_few(A, B):
    return reached(A, B)[:1]


@pytest.mark.parametrize(
    "wrong, word",
    [
        (rows_of_B, "modal coordinates|eigenvalue"),
        (once_for_all, "is reached|is not reached"),
        (eigenvectors, "Ask for the rank"),
        (real_part, "real part alone"),
        (too_few, "one answer for each"),
    ],
)
def test_wrong_tests_are_explained(wrong, word):
    with pytest.raises(AssertionError, match=word):
        check_reached(wrong)
