"""Checks of the exercises of chapter 9: the B'MOJO layer."""

from collections.abc import Callable

import numpy as np


def check_ramp_peak(ramp_peak: Callable) -> None:
    """Exercise 9.1: ``ramp_peak(height, n, k)``, the largest error of the k-average on a ramp.

    The signal is 0, then rises by height / n at each of n steps, then stays at height.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    for height, n, k in ((1.0, 1, 4), (6.0, 2, 4), (5.0, 4, 4), (10.0, 50, 4), (-3.0, 3, 7)):
        value = float(ramp_peak(height, n, k))
        right = _ramp_peak(height, n, k)
        case = f"height={height}, n={n}, k={k}"
        if n > 1 and k > 1 and np.isclose(value, height / n):
            raise AssertionError(
                f"{case}: that is the step of the ramp, the error of predicting y_t by y_(t-1); "
                "the average lies further back"
            )
        if n < k and np.isclose(value, height / n * (k + 1) / 2):
            raise AssertionError(
                f"{case}: with n < k the average still contains zeros from before the ramp; "
                "the formula for a long ramp is too large"
            )
        assert np.isclose(abs(value), abs(right)), (
            f"{case}: the largest error is {right:.4g}, not {value:.4g}. Write the average of the "
            "last k values at the moment the ramp ends, or a moment before"
        )
    print("OK: a slow change is a small surprise, however large it is in the end")


def _ramp_peak(height: float, n: int, k: int) -> float:
    y = np.concatenate([np.zeros(k), height / n * np.arange(1, n + 1), np.full(k, height)])
    average = np.array([y[t - k : t].mean() for t in range(k, len(y))])
    error = y[k:] - average
    return error[np.abs(error).argmax()]


def check_best_weights(best_weights: Callable) -> None:
    """Exercise 9.2: ``best_weights(v)``, the best weights of sum one, from a variogram.

    v is an array of v_0 = 0, v_1, .., v_k with v_h = E (y_t - y_(t-h))^2 / 2.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    h = np.arange(5.0)
    cases = {
        "a level in white noise": (h > 0) * 1.0,
        "a random walk": h / 2,
        "a random walk in white noise": (h > 0) * 1.0 + 0.3 * h / 2,
        "an AR(1) with pole 0.8": (1 - 0.8**h) / (1 - 0.64),
    }
    for name, v in cases.items():
        w = np.asarray(best_weights(v), dtype=float)
        assert w.shape == (4,), f"{name}: one weight for each of 4 past values, got shape {w.shape}"
        assert np.isclose(w.sum(), 1), (
            f"{name}: the weights must sum to one, so that the predictor is right for every level; "
            f"yours sum to {w.sum():.4g}"
        )
        best = _best_weights(v)
        if np.allclose(w, best[::-1]) and not np.allclose(best, best[::-1]):
            raise AssertionError(f"{name}: w_1 belongs to y_(t-1), the latest; yours are reversed")
        assert np.allclose(w, best, atol=1e-8), (
            f"{name}: the error is {_error(w, v):.4g}, the best is {_error(best, v):.4g}. Set the "
            "derivative of 2 w'v - w'Vw, less lambda (sum w - 1), to zero, V_ij = v_|i-j|"
        )
    print("OK: equal weights for a level in white noise, and only there")


def _best_weights(v: np.ndarray) -> np.ndarray:
    k = len(v) - 1
    V = v[np.abs(np.subtract.outer(np.arange(k), np.arange(k)))]
    system = np.block([[V, np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
    return np.linalg.solve(system, np.append(v[1:], 1.0))[:k]


def _error(w: np.ndarray, v: np.ndarray) -> float:
    """E (y_t - sum_j w_j y_(t-j))^2 for weights of sum one."""
    k = len(w)
    V = v[np.abs(np.subtract.outer(np.arange(k), np.arange(k)))]
    return float(2 * w @ v[1:] - w @ V @ w)
