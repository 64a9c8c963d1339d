"""Stochastic realization: from the covariances of a process to all of its states.

A stationary process y has covariances L_k = E y_{t+k} y_t'. When their Hankel matrix has finite
rank n they factor like the Markov parameters of a linear system (Ho-Kalman on covariances):

    L_k = C A^{k-1} G,  k >= 1                                                             (1)

A state x_t with covariance P generates y as soon as its noises have a covariance, that is when

    M(P) = [ P   - A P A'   G - A P C'  ]
           [ G' - C P A'    L0 - C P C' ]  >=  0            (positive-real lemma)          (2)

The set of such P is convex and compact, and has a smallest and a largest member (Faurre):

    P_min <= P <= P_max.

P_min is the covariance of the best predictor of the state from the past of y, P_max the inverse of
the covariance of its mirror image, the predictor from the future. Both come from one doubling:
with pasts and futures of length 2^k the two covariances H_k, J_k obey (see `_past_and_future`)

    H_{k+1} = H_k + a' H_k (I - J_k H_k)^{-1} a,   J_{k+1} = J_k + a (I - J_k H_k)^{-1} J_k a'   (3)

and the eigenvalues of J_k H_k are the squared canonical correlations between past and future. So
(2) has a solution if and only if they stay below 1: the recursion is its own certificate.

P_min gives the innovation model and its prediction error,

    Lambda = L0 - C P_min C',   K = (G - A P_min C') Lambda^{-1},                          (4)
    log det Lambda = mean over the unit circle of log det Phi      (Kolmogorov-Szego)      (5)

Glossary
    n, p                 orders of state and output      L_k (p, p)   covariances, L0 = L_0
    A (n, n)  C (p, n)   state transition, output        G (n, p)     E x_{t+1} y_t'
    P (n, n)             state covariance                Phi (p, p)   spectral density
    K (n, p)             gain                            Lambda (p, p) innovation covariance

Source: Faurre, Clerget and Germain, Operateurs rationnels positifs (1979); Lindquist and Picci,
Linear Stochastic Systems (2015), chapters 6 and 8; Anderson and Moore, Optimal Filtering (1979).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from realization.hankel import ho_kalman
from realization.models import InnovationModel, StochasticRealization, symmetric_part
from realization.systems import Array, StateSpace, as_real_array

MAX_DOUBLINGS = 60
CORRELATION_TOLERANCE = 1e-12
# White noise that may be added, relative to L0, before covariances are refused: rounding errors
# make Phi negative by as much where it should be zero.
ADDED_NOISE = 1e-13


# --- covariances to a state -----------------------------------------------------------------------


def covariance_realization(
    cov: ArrayLike, order: int | None = None
) -> tuple[Array, Array, Array, Array]:
    """Factor a covariance sequence, L_k = C A^{k-1} G for k >= 1.

    Parameters
    ----------
    cov : array_like, shape (k, p, p)
        L_0 .. L_{k-1} with L_i = E y_{t+i} y_t', k >= 3; lags 1 .. k-1 fill the Hankel matrix.
    order : int, optional
        Dimension n of the state; chosen by `ho_kalman` when left out.

    Returns
    -------
    A, C, G, L0 : ndarrays, shapes (n, n), (p, n), (n, p), (p, p)

    Raises
    ------
    ValueError
        If the shape is wrong, L_0 is not symmetric positive definite, or the order does not fit.

    Notes
    -----
    Exact covariances of a process of order n give an exact realization. Estimated ones give an
    approximation that need not be positive real; `faurre_bounds` says so when it is not.
    Source: Lindquist and Picci (2015), section 6.5.
    """
    cov = as_real_array("cov", cov, 3)
    if cov.shape[0] < 3 or cov.shape[1] != cov.shape[2]:
        raise ValueError(f"cov must have shape (k >= 3, p, p), got {cov.shape}")
    L0 = _checked_variance("cov[0]", cov[0])
    system = ho_kalman(cov, order)
    return system.A, system.C, system.B, L0


def spectral_density(
    A: ArrayLike, C: ArrayLike, G: ArrayLike, L0: ArrayLike, omega: ArrayLike
) -> NDArray[np.complex128]:
    """Phi(e^{i omega}) = sum over all lags of L_k e^{-i omega k}.

    Parameters
    ----------
    A, C, G, L0 : array_like, shapes (n, n), (p, n), (n, p), (p, p)
        Covariance realization.
    omega : array_like, shape (...,)
        Frequencies, radians a step.

    Returns
    -------
    ndarray of complex, shape omega.shape + (p, p)
        Hermitian; positive semidefinite at every frequency when the realization is positive real.

    Raises
    ------
    ValueError
        If shapes do not fit, A is not stable, L0 is not symmetric, or a frequency is not real and
        finite.
    """
    A, C, G, L0 = _checked_realization(A, C, G, L0)
    omega = as_real_array("omega", omega, np.ndim(omega))
    half = StateSpace(A, G, C, L0 / 2).transfer_function(np.exp(1j * omega))
    return half + np.swapaxes(half.conj(), -1, -2)


# --- positive-real lemma --------------------------------------------------------------------------


def positive_real_matrix(A: Array, C: Array, G: Array, L0: Array, P: Array) -> Array:
    """M(P) of equation (2), shape (n + p, n + p): the noise covariance that P would need.

    Parameters
    ----------
    A, C, G, L0 : array_like, shapes (n, n), (p, n), (n, p), (p, p)
        Covariance realization.
    P : array_like, shape (n, n)
        Candidate state covariance, symmetric.

    Returns
    -------
    ndarray, shape (n + p, n + p)
        Positive semidefinite exactly when P is the state covariance of some realization.

    Raises
    ------
    ValueError
        If shapes do not fit, A is not stable, or L0 or P is not symmetric.
    """
    A, C, G, L0 = _checked_realization(A, C, G, L0)
    P = _checked_symmetric("P", as_real_array("P", P, 2), len(A))
    S = G - A @ P @ C.T
    return symmetric_part(np.block([[P - A @ P @ A.T, S], [S.T, L0 - C @ P @ C.T]]))


def is_positive_real(A: ArrayLike, C: ArrayLike, G: ArrayLike, L0: ArrayLike) -> bool:
    """True when L_0, C G, C A G, .. are the covariances of a process.

    Parameters
    ----------
    A, C, G, L0 : array_like, shapes (n, n), (p, n), (n, p), (p, p)
        Covariance realization, A stable, L0 symmetric.

    Returns
    -------
    bool
        Equivalently: Phi >= 0 on the unit circle; M(P) >= 0 for some P.

    Notes
    -----
    The certificate is recursion (3): at step k it decides whether the block Toeplitz matrix of
    2^{k+1} covariances is positive definite.
    """
    A, C, G, L0 = _checked_realization(A, C, G, L0)
    if np.linalg.eigvalsh(L0)[0] <= 0:
        return False
    return _bounds_or_none(A, C, G, L0) is not None


def faurre_bounds(A: ArrayLike, C: ArrayLike, G: ArrayLike, L0: ArrayLike) -> tuple[Array, Array]:
    """The smallest and the largest state covariance among all realizations of a process.

    Parameters
    ----------
    A, C, G, L0 : array_like, shapes (n, n), (p, n), (n, p), (p, p)
        Minimal covariance realization, A stable, L0 symmetric positive definite.

    Returns
    -------
    P_min, P_max : ndarrays, shape (n, n)
        Symmetric, 0 < P_min <= P_max. Both make M(P) positive semidefinite of rank p, and so does
        every convex combination of them (of higher rank).

    Raises
    ------
    ValueError
        If A is not stable, the realization is not minimal, or it is not positive real.

    Notes
    -----
    Converges quadratically; when the spectral factor has a zero on the unit circle only linearly,
    and the result is then good to about eps^(1 / 2k), k the zero's multiplicity and eps what
    rounding is to the prediction error: 1e-13 L0 / Lambda. On which side of singular such a Phi
    falls is for rounding to decide, so covariances that white noise of 1e-13 L0 makes those of a
    process pass for them.
    Source: Faurre, Clerget and Germain (1979); Lindquist and Picci (2015), section 8.
    """
    A, C, G, L0 = _checked_realization(A, C, G, L0)
    P_min, dual = _certified_bounds(A, C, G, L0)
    if A.shape[0] == 0:
        return P_min, dual
    values = np.linalg.eigvalsh(dual)
    if values[0] <= values[-1] * A.shape[0] * np.finfo(float).eps:
        raise ValueError(
            "(A, C) must be observable: along some direction P_max is unbounded, or too large for "
            "double precision"
        )
    return P_min, symmetric_part(np.linalg.inv(dual))


def _past_and_future(A: Array, C: Array, G: Array, L0: Array) -> tuple[Array, Array] | None:
    """Doubling (3): covariances of the state predicted from the past, and from the future.

    H is the limit of H = a' H (I - J0 H)^{-1} a + H0, J of J = a J (I - H0 J)^{-1} a' + J0, with
    a' = A - G L0^{-1} C, H0 = G L0^{-1} G', J0 = C' L0^{-1} C: the Riccati equation of P_min and
    its mirror image. Returns None as soon as past and future are correlated by 1 or more.
    """
    n = A.shape[0]
    H, J = G @ np.linalg.solve(L0, G.T), C.T @ np.linalg.solve(L0, C)
    a = (A - G @ np.linalg.solve(L0, C)).T
    identity = np.eye(n)
    for _ in range(MAX_DOUBLINGS):
        correlations = np.linalg.eigvals(J @ H).real
        if correlations.max(initial=0.0) >= 1 + CORRELATION_TOLERANCE:
            return None
        try:
            inverse_a = np.linalg.solve(identity - J @ H, a)
            inverse_J = np.linalg.solve(identity - J @ H, J)
        except np.linalg.LinAlgError:  # a canonical correlation of exactly 1: the limit is reached
            return H, J
        step_H, step_J = a.T @ H @ inverse_a, a @ inverse_J @ a.T
        # Near a zero of Phi on the unit circle, rounding ends the growth before the steps vanish.
        if not (np.isfinite(step_H).all() and np.isfinite(step_J).all()):
            return H, J
        H, J = symmetric_part(H + step_H), symmetric_part(J + step_J)
        a = a @ inverse_a
        small = 1e-16 * np.array([np.linalg.norm(H), np.linalg.norm(J)])
        if np.linalg.norm(step_H) <= small[0] and np.linalg.norm(step_J) <= small[1]:
            break
    return H, J


def _bounds_or_none(A: Array, C: Array, G: Array, L0: Array) -> tuple[Array, Array] | None:
    """(P_min, P_max^{-1}), if need be of the process plus the smallest white noise; else None."""
    bounds = _past_and_future(A, C, G, L0)
    return _past_and_future(A, C, G, L0 * (1 + ADDED_NOISE)) if bounds is None else bounds


def _certified_bounds(A: Array, C: Array, G: Array, L0: Array) -> tuple[Array, Array]:
    """(P_min, P_max^{-1}), or the ValueError that says what is not a covariance sequence."""
    _checked_variance("L0", L0)
    bounds = _bounds_or_none(A, C, G, L0)
    if bounds is None:
        raise ValueError(
            "(A, C, G, L0) must be positive real: these are not the covariances of a process "
            "(some block Toeplitz matrix of them has a negative eigenvalue)"
        )
    return bounds


def stochastic_realization(
    A: ArrayLike, C: ArrayLike, G: ArrayLike, L0: ArrayLike, P: ArrayLike
) -> StochasticRealization:
    """The realization whose state has covariance P.

    Q = P - A P A', S = G - A P C', R = L0 - C P C', the blocks of M(P).

    Parameters
    ----------
    A, C, G, L0 : array_like, shapes (n, n), (p, n), (n, p), (p, p)
        Covariance realization, A stable.
    P : array_like, shape (n, n)
        A solution of M(P) >= 0: P_min, P_max, any convex combination of solutions.

    Returns
    -------
    StochasticRealization
        Its outputs have the covariances L_0, C G, C A G, ..

    Raises
    ------
    ValueError
        If P is not symmetric of shape (n, n), or M(P) is not positive semidefinite. For n = 1 the
        solutions are exactly the interval [P_min, P_max]; for n > 1 they are a convex subset of it
        that touches both ends.
    """
    A, C, G, L0 = _checked_realization(A, C, G, L0)
    P = _checked_symmetric("P", as_real_array("P", P, 2), len(A))
    M = positive_real_matrix(A, C, G, L0, P)
    n = len(A)
    # In the units of P and L0: eigenvalues mean nothing for entries that others dwarf.
    size = np.sqrt(np.maximum(np.r_[np.diag(P), np.diag(L0)], 0))
    size[size == 0] = 1.0
    M = M / np.outer(size, size)
    values, vectors = np.linalg.eigh(M)
    if values[0] < -1e-8 * values[-1]:
        raise ValueError(
            "P must satisfy M(P) >= 0 (the positive-real lemma); the smallest eigenvalue of M(P) "
            f"is {values[0]:.3g} in units in which P and L0 have unit diagonals"
        )
    M = symmetric_part((vectors * np.clip(values, 0, None)) @ vectors.T) * np.outer(size, size)
    return StochasticRealization(A, C, Q=M[:n, :n], R=M[n:, n:], S=M[:n, n:])


# --- innovation models, spectral factor, prediction error -----------------------------------------


def innovations_model(A: ArrayLike, C: ArrayLike, G: ArrayLike, L0: ArrayLike) -> InnovationModel:
    """The realization with the smallest state, which is computable from the past of y.

    Parameters
    ----------
    A, C, G, L0 : array_like, shapes (n, n), (p, n), (n, p), (p, p)
        Covariance realization, A stable, L0 symmetric positive definite; need not be minimal.

    Returns
    -------
    InnovationModel
        K = (G - A P_min C') Lambda^{-1}, Lambda = L0 - C P_min C'; A - K C has no eigenvalue
        outside the unit circle, so the model can be inverted: e_t is a function of y_t, y_{t-1}, ..

    Raises
    ------
    ValueError
        If A is not stable, the realization is not positive real, or Lambda is singular: the past
        then foretells some combination of several outputs exactly.
    """
    A, C, G, L0 = _checked_realization(A, C, G, L0)
    P, _ = _certified_bounds(A, C, G, L0)
    Lambda = symmetric_part(L0 - C @ P @ C.T)
    scale = np.sqrt(np.diag(L0))
    if np.linalg.eigvalsh(Lambda / np.outer(scale, scale))[0] <= len(L0) * np.finfo(float).eps:
        raise ValueError(
            "(A, C, G, L0) has a singular innovation covariance: some combination of the outputs "
            "is foretold exactly by the past"
        )
    K = np.linalg.solve(Lambda, (G - A @ P @ C.T).T).T
    return InnovationModel(A, K, C, Lambda)


def backward_innovations_model(
    A: ArrayLike, C: ArrayLike, G: ArrayLike, L0: ArrayLike
) -> InnovationModel:
    """The innovation model of the same process with time reversed.

        xbar_{t-1} = A' xbar_t + Kbar ebar_t,    y_t = G' xbar_t + ebar_t

    Parameters
    ----------
    A, C, G, L0 : array_like, shapes (n, n), (p, n), (n, p), (p, p)
        Covariance realization of y.

    Returns
    -------
    InnovationModel
        (A', Kbar, G', Lambdabar), to be run on y[::-1]: it predicts y_t from its future. Its state
        covariance is P_max^{-1}. With one output Lambdabar equals Lambda; with several only the
        determinants agree.

    Raises
    ------
    ValueError
        As `innovations_model`.
    """
    A, C, G, L0 = _checked_realization(A, C, G, L0)
    return innovations_model(A.T, G.T, C.T, L0)


def spectral_factor(A: ArrayLike, C: ArrayLike, G: ArrayLike, L0: ArrayLike) -> StateSpace:
    """The minimum-phase W with W(z) W(1/z)' = Phi(z): the innovation model with unit noise.

    Parameters
    ----------
    A, C, G, L0 : array_like, shapes (n, n), (p, n), (n, p), (p, p)
        Covariance realization, positive real.

    Returns
    -------
    StateSpace
        (A, K F, C, F) with F the lower Cholesky factor of Lambda: stable, and its inverse has no
        pole outside the unit circle.

    Raises
    ------
    ValueError
        As `innovations_model`.
    """
    model = innovations_model(A, C, G, L0)
    F = np.linalg.cholesky(model.Lambda)
    return StateSpace(model.A, model.K @ F, model.C, F)


def kolmogorov_szego(
    A: ArrayLike, C: ArrayLike, G: ArrayLike, L0: ArrayLike, rtol: float = 1e-10
) -> float:
    """det Lambda from the spectrum alone, exp(mean over the circle of log det Phi), equation (5).

    Parameters
    ----------
    A, C, G, L0 : array_like, shapes (n, n), (p, n), (n, p), (p, p)
        Covariance realization, positive real.
    rtol : float
        Relative accuracy asked of the mean: the number of frequencies is doubled until two results
        agree to it.

    Returns
    -------
    float
        Generalized variance of the one-step prediction error, units of y to the power 2 p.

    Raises
    ------
    ValueError
        If Phi is not positive definite at a frequency that is visited, or 2^20 frequencies do not
        reach rtol.
    """
    previous = np.inf
    for doublings in range(6, 21):
        # Midpoints, so that zeros of Phi at omega = 0 and pi (differencing) are not hit.
        omega = (np.arange(2**doublings) + 0.5) * np.pi / 2**doublings
        sign, logdet = np.linalg.slogdet(spectral_density(A, C, G, L0, omega))
        if np.any(sign.real <= 0):
            raise ValueError("the spectral density must be positive definite on the unit circle")
        value = float(logdet.mean())
        if abs(value - previous) <= rtol:
            return float(np.exp(value))
        previous = value
    raise ValueError(f"log det Phi needs over 2^20 frequencies for rtol={rtol:g}")


# --- checks ---------------------------------------------------------------------------------------


def _checked_symmetric(name: str, M: Array, size: int) -> Array:
    if M.shape != (size, size):
        raise ValueError(f"{name} must have shape {(size, size)}, got {M.shape}")
    if not np.allclose(M, M.T, rtol=1e-8, atol=1e-12 * np.abs(M).max(initial=0.0)):
        raise ValueError(f"{name} must be symmetric, it is a covariance")
    return symmetric_part(M)


def _checked_variance(name: str, L0: Array) -> Array:
    L0 = _checked_symmetric(name, L0, len(L0))
    smallest = np.linalg.eigvalsh(L0)[0]
    if smallest <= 0:
        raise ValueError(f"{name} must be positive definite, its eigenvalues reach {smallest:.3g}")
    return L0


def _checked_realization(
    A: ArrayLike, C: ArrayLike, G: ArrayLike, L0: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """Shapes (n, n), (p, n), (n, p), (p, p), a stable A and a symmetric L0, made exactly so."""
    A, C, G, L0 = (
        as_real_array(name, M, 2) for name, M in zip(["A", "C", "G", "L0"], (A, C, G, L0))
    )
    n, p = A.shape[0], L0.shape[0]
    shapes = {"A": (A, (n, n)), "C": (C, (p, n)), "G": (G, (n, p)), "L0": (L0, (p, p))}
    for name, (M, shape) in shapes.items():
        if M.shape != shape or p < 1:
            raise ValueError(
                f"{name} must have shape {shape} (n={n} from A, p={p} from L0), got {M.shape}"
            )
    radius = np.abs(np.linalg.eigvals(A)).max(initial=0.0)
    if radius >= 1:
        raise ValueError(f"A must be stable, its spectral radius is {radius:.6g}")
    return A, C, G, _checked_symmetric("L0", L0, p)
