"""The checks of chapter 5 accept right answers and explain plausible wrong ones."""

import numpy as np
import pytest
from checks.ch05 import check_down_shift, check_weighted_sliding_sum


def down(N, s):
    return np.kron(np.eye(N, k=-1), np.eye(s)), np.eye(N * s)[:, :s]


def weighted(lam, N):
    A = np.zeros((N + 1, N + 1))
    A[0, :2] = lam, -(lam**N)
    A[1:, 1:] = np.eye(N, k=1)
    return A, np.eye(N + 1)[0] + np.eye(N + 1)[-1]


def test_right_answers_pass(capsys):
    check_down_shift(down)
    check_weighted_sliding_sum(weighted)
    assert capsys.readouterr().out.count("OK") == 2


def up(N, s):
    return np.kron(np.eye(N, k=1), np.eye(s)), np.eye(N * s)[:, -s:]


def swapped(N, s):
    A, W = down(N, s)
    order = [0, 2, 1, 3]
    return np.kron(np.eye(N)[order], np.eye(s)) @ A, W


def unweighted(lam, N):
    A, W = weighted(lam, N)
    A[0, :2] = 1, -1
    return A, W


def no_power(lam, N):
    A, W = weighted(lam, N)
    A[0, 1] = -1
    return A, W


def recomputed(lam, N):
    A, W = weighted(lam, N)
    A[0] = [0, 0, *lam ** np.arange(N - 1, 0, -1)]
    return A, W


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (check_down_shift, up, "oldest token first"),
        (check_down_shift, swapped, "block j must hold"),
        (check_down_shift, lambda N, s: (np.eye(N), np.eye(N)), r"A must be \(8, 8\)"),
        (check_down_shift, lambda N, s: (down(N, s)[0], np.eye(N * s)), "W writes s numbers"),
        (check_down_shift, lambda N, s: (down(N, s)[0], up(N, s)[1]), "block 0"),
        (check_weighted_sliding_sum, unweighted, "weigh the newest"),
        (check_weighted_sliding_sum, no_power, "subtract lam\\^N"),
        (check_weighted_sliding_sum, recomputed, "carried on with the factor lam"),
        (check_weighted_sliding_sum, lambda lam, N: (np.eye(N), np.eye(N)[0]), "must be 6 x 6"),
    ],
)
def test_wrong_answers_are_explained(check, answer, message):
    with pytest.raises(AssertionError, match=message):
        check(answer)
