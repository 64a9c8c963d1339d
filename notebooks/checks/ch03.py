"""Checks of the exercises of chapter 3: stochastic realization."""

from collections.abc import Callable

import numpy as np

from realization import faurre_bounds, output_covariances


def check_ma_bounds(ma_bounds: Callable) -> None:
    """Exercise 3.1: ``ma_bounds(theta, sigma2) -> (P_min, P_max)`` for y_t = e_t + theta e_{t-1}.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    for theta, sigma2 in ((0.5, 1.0), (-0.8, 2.0), (2.0, 1.0), (-1.25, 0.4)):
        low, high = (float(value) for value in ma_bounds(theta, sigma2))
        case = f"theta={theta}, sigma2={sigma2}"
        assert low <= high, f"{case}: P_min={low:.4g} is larger than P_max={high:.4g}; swapped?"
        matrices = [0.0, 1.0, theta * sigma2, (1 + theta**2) * sigma2]
        P_min, P_max = (float(P[0, 0]) for P in faurre_bounds(*np.reshape(matrices, (4, 1, 1))))
        if abs(theta) > 1 and np.isclose(high, sigma2) and np.isclose(low, sigma2 * theta**2):
            raise AssertionError(f"{case}: with |theta| > 1 the two roots change places")
        if np.isclose(low * sigma2, P_min) and sigma2 != 1:
            raise AssertionError(f"{case}: the bounds are variances, so they scale with sigma2")
        assert np.isclose(low, P_min, rtol=1e-8), (
            f"{case}: P_min should be {P_min:.4g}, not {low:.4g}. Put A = 0, C = 1 into M(P) and "
            "ask where its determinant P (L0 - P) - G^2 vanishes"
        )
        assert np.isclose(high, P_max, rtol=1e-8), (
            f"{case}: P_max should be {P_max:.4g}, not {high:.4g}: "
            "the other root of the determinant"
        )
    print("OK: both roots of det M(P) = 0, in the right order")


def check_riccati_iteration(riccati_iteration: Callable) -> None:
    """Exercise 3.2: ``riccati_iteration(A, C, G, L0, k)``, the state predicted from k outputs.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    A = np.array([[0.7, 0.4], [-0.4, 0.7]])
    C, G, L0 = np.array([[1.0, 0.5]]), np.array([[0.6], [-0.2]]), np.array([[1.5]])
    zero = np.asarray(riccati_iteration(A, C, G, L0, 0), dtype=float)
    assert zero.shape == (2, 2), f"P_k has the shape of A, (2, 2); yours is {zero.shape}"
    assert not zero.any(), "P_0 must be zero: from no outputs the best guess of the state is 0"
    for k in (1, 2, 5):
        P = np.asarray(riccati_iteration(A, C, G, L0, k), dtype=float)
        assert np.isfinite(P).all(), f"P_{k} is not finite"
        right = predicted_covariance(A, C, G, L0, k)
        if k == 1 and np.allclose(P, G @ G.T):
            raise AssertionError(
                "P_1 is G G': the innovation must be weighted by its inverse variance"
            )
        if k == 2 and np.allclose(P, _without_propagation(A, C, G, L0)):
            raise AssertionError("the first term A P A' is missing: what was known must move on")
        assert np.allclose(P, P.T), f"P_{k} is a covariance, it must be symmetric"
        assert np.allclose(P, right, rtol=1e-8, atol=1e-10), (
            f"P_{k} must be the covariance of the state predicted from {k} outputs: "
            f"trace {np.trace(right):.4g}, yours has {np.trace(P):.4g}. The gain is "
            "(G - A P C') (L0 - C P C')^-1"
        )
    print("OK: P_k is what k outputs tell of the state, and grows to P_min")


def predicted_covariance(A, C, G, L0, k) -> np.ndarray:
    """Covariance of E[x | last k outputs], from their joint covariance and nothing else."""
    p = len(L0)
    cov = output_covariances(A, C, G, L0, k)
    past = np.block([[cov[s - t] if s >= t else cov[t - s].T for t in range(k)] for s in range(k)])
    cross = np.hstack([np.linalg.matrix_power(A, h - 1) @ G for h in range(k, 0, -1)])
    assert past.shape == (k * p, k * p)
    return cross @ np.linalg.solve(past, cross.T)


def _without_propagation(A, C, G, L0) -> np.ndarray:
    P = np.zeros_like(A)
    for _ in range(2):
        gain = G - A @ P @ C.T
        P = gain @ np.linalg.solve(L0 - C @ P @ C.T, gain.T)
    return P
