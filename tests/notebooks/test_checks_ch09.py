"""The checks of chapter 9 accept right answers and explain plausible wrong ones."""

import numpy as np
import pytest
from checks.ch09 import check_best_weights, check_ramp_peak


def ramp_peak(height, n, k):
    m = min(n, k)
    return height / n * (m + 1) / 2 if n >= k else height / n * (n - n * (n - 1) / (2 * k))


def best_weights(v):
    k = len(v) - 1
    V = np.array([[v[abs(i - j)] for j in range(k)] for i in range(k)])
    a, b = np.linalg.lstsq(V, np.c_[v[1:], np.ones(k)], rcond=None)[0].T
    return a + b * (1 - a.sum()) / b.sum()


def test_right_answers_pass(capsys):
    check_ramp_peak(ramp_peak)
    check_ramp_peak(lambda *args: -ramp_peak(*args))  # the sign of an error is a convention
    check_best_weights(best_weights)
    assert capsys.readouterr().out.count("OK") == 3


def covariance_weights(v):
    r = v[-1] + 1 - v
    k = len(v) - 1
    return np.linalg.solve([[r[abs(i - j)] for j in range(k)] for i in range(k)], r[1:])


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_ramp_peak, lambda h, n, k: h / n if n > 1 else h, "average lies further back"),
        (check_ramp_peak, lambda h, n, k: h / n * (k + 1) / 2, "zeros from before the ramp"),
        (check_ramp_peak, lambda h, n, k: h, "largest error is"),
        (check_best_weights, lambda v: best_weights(v)[::-1], "reversed"),
        (check_best_weights, lambda v: np.full(4, 0.25), "a random walk: the error is"),
        (check_best_weights, covariance_weights, "must sum to one"),
        (check_best_weights, lambda v: np.ones(len(v)) / len(v), "got shape"),
    ],
)
def test_wrong_answers_are_explained(check, wrong, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong)
