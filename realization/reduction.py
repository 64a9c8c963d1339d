"""Gramians, Hankel singular values, and truncation with a guarantee.

    P = sum_k A^k B B^T A^kT      P = A P A^T + B B^T     how far the inputs push each direction
    Q = sum_k A^kT C^T C A^k      Q = A^T Q A + C^T C     how loudly each direction is heard
    sigma_i = sqrt(eig_i(P Q))    the Hankel singular values, the same in every basis

In balanced coordinates P = Q = diag(sigma). Cutting the states after the r-th costs at most

    max_omega || G(e^{i omega}) - G_r(e^{i omega}) ||  <=  2 (sigma_{r+1} + .. + sigma_n)

Stochastic balancing does the same to the *relative* error: sigma_i are then the cosines of the
angles between the past and the future of the process y = G e (e white), and

    || G^{-1} (G - G_r) ||_inf  <=  prod_{i > r} (1 + sigma_i) / (1 - sigma_i) - 1

Everything is computed from factors P = S S^T, Q = R R^T, never from P and Q themselves: squaring
would lose every sigma_i below 1e-8 sigma_1.

Glossary
    S (n, n), R (n, n)   Gramian factors       sigma (n,)   Hankel singular values, descending
    W, w                 spectral factor of G G~ on the other side, and its Gramian

Source: Glover, Int. J. Control 39 (1984); Al-Saggaf and Franklin, IEEE TAC 32 (1987); Green, IEEE
TAC 33 (1988); Antoulas, Approximation of Large-Scale Dynamical Systems (2005), chapter 7.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_continuous_are

from realization.systems import Array, StateSpace

EPS = float(np.finfo(np.float64).eps)


def require_stable(sys: StateSpace) -> None:
    """Raise the ValueError that Gramians of an unstable system deserve."""
    if not sys.is_stable:
        raise ValueError(
            f"sys must be stable, got a pole of modulus {sys.spectral_radius:.6g} (needs < 1)"
        )


def gramian_factor(A: Array, B: Array) -> Array:
    """S with S S^T = sum_k A^k B B^T A^kT, by doubling: S <- [S, A^(2^j) S], compressed by QR.

    Parameters
    ----------
    A : ndarray, shape (n, n)
        Spectral radius below 1.
    B : ndarray, shape (n, m)

    Returns
    -------
    ndarray, shape (n, min(n, columns))
        Lower-triangular once it has n columns.
    """
    S, power = B, A
    for _ in range(64):
        tail = power @ S
        S = np.hstack([S, tail])
        if S.shape[1] > S.shape[0]:
            S = np.linalg.qr(S.T, mode="r").T
        with np.errstate(over="ignore"):  # a matrix far from normal grows before it decays
            size = np.linalg.norm(S, axis=1)  # of each state in its own units
        if not (np.isfinite(size).all() and np.isfinite(power).all()):
            break
        if (np.linalg.norm(tail, axis=1) <= EPS * size).all():
            return S
        power = power @ power
    raise ValueError("sys must be stable: the powers of A do not decay in double precision")


def reachability_gramian(sys: StateSpace) -> Array:
    """P = A P A^T + B B^T, shape (n, n).

    Parameters
    ----------
    sys : StateSpace
        Stable.

    Returns
    -------
    ndarray, shape (n, n)
        State covariance when the input is white noise of unit variance.

    Raises
    ------
    ValueError
        If sys is not stable.
    """
    require_stable(sys)
    S = gramian_factor(sys.A, sys.B)
    return S @ S.T


def observability_gramian(sys: StateSpace) -> Array:
    """Q = A^T Q A + C^T C, shape (n, n).

    Parameters
    ----------
    sys : StateSpace
        Stable.

    Returns
    -------
    ndarray, shape (n, n)
        x0^T Q x0 is the energy of the output that x0 alone causes.

    Raises
    ------
    ValueError
        If sys is not stable.
    """
    require_stable(sys)
    R = gramian_factor(sys.A.T, sys.C.T)
    return R @ R.T


def hankel_singular_values(sys: StateSpace) -> Array:
    """Hankel singular values sqrt(eig(P Q)), descending.

    Parameters
    ----------
    sys : StateSpace
        Stable.

    Returns
    -------
    ndarray, shape (n,)
        In units of output over input; zero for directions that are not both reached and seen.

    Raises
    ------
    ValueError
        If sys is not stable.
    """
    require_stable(sys)
    S, R = gramian_factor(sys.A, sys.B), gramian_factor(sys.A.T, sys.C.T)
    sigma = np.linalg.svd(R.T @ S, compute_uv=False)
    return np.concatenate([sigma, np.zeros(sys.n - sigma.size)])


def balancing_projection(S: Array, R: Array, order: int) -> tuple[Array, Array, Array]:
    """L (order, n), V (n, order), sigma with L V = I, L P L^T = V^T Q V = diag(sigma[:order]).

    Parameters
    ----------
    S, R : ndarray, shape (n, n)
        Factors of P = S S^T and Q = R R^T.
    order : int
        States to keep.

    Returns
    -------
    L, V, sigma : ndarray
        Each state's sign is chosen so that the largest entry of its row of L is positive.

    Raises
    ------
    ValueError
        If sigma[order - 1] is zero to working precision: those states cannot be balanced.
    """
    U, sigma, Wt = np.linalg.svd(R.T @ S)
    available = int((sigma > S.shape[0] * EPS * sigma.max(initial=0.0)).sum())
    if order > available:
        raise ValueError(
            f"sys must have at least {order} Hankel singular values above rounding errors to keep "
            f"{order} states, got {available}; keep fewer, or use minimal(sys), which removes "
            "states that are not reached or not seen"
        )
    scale = 1 / np.sqrt(sigma[:order])
    L = scale[:, None] * (U[:, :order].T @ R.T)
    V = (S @ Wt[:order].T) * scale
    sign = np.sign(L[np.arange(order), np.abs(L).argmax(axis=1)]) if order else np.ones(0)
    return sign[:, None] * L, V * sign, sigma


def _require_order(sys: StateSpace, order: int) -> None:
    if isinstance(order, bool) or not isinstance(order, (int, np.integer)):
        raise ValueError(f"order must be an integer, got {order!r}")
    if not 0 <= order <= sys.n:
        raise ValueError(f"order must lie in 0 .. n = {sys.n}, got {order}")


def balanced_truncation(sys: StateSpace, order: int) -> tuple[StateSpace, float]:
    """Keep the `order` states with the largest Hankel singular values.

    Parameters
    ----------
    sys : StateSpace
        Stable.
    order : int
        States to keep, 0 <= order <= the number of nonzero Hankel singular values.

    Returns
    -------
    reduced : StateSpace
        Stable, balanced, of the given order.
    bound : float
        2 (sigma_{order+1} + .. + sigma_n): the largest singular value of G(z) - G_r(z) stays below
        it at every point of the unit circle.

    Raises
    ------
    ValueError
        If sys is not stable or the order is out of range.
    """
    require_stable(sys)
    _require_order(sys, order)
    S, R = gramian_factor(sys.A, sys.B), gramian_factor(sys.A.T, sys.C.T)
    L, V, sigma = balancing_projection(S, R, order)
    reduced = StateSpace(L @ sys.A @ V, L @ sys.B, sys.C @ V, sys.D)
    return reduced, float(2 * sigma[order:].sum())


def stochastic_balanced_truncation(sys: StateSpace, order: int) -> tuple[StateSpace, float]:
    """Balanced truncation that bounds the relative error, for a square invertible spectral factor.

    The angles between past and future need the spectral factor W of G G~ = W~ W. It comes from a
    Riccati equation in continuous time, to which z = (1 + s) / (1 - s) carries the system: under
    this map Gramians and angles stay what they are and truncation keeps Green's bound, which is
    proved there.

    Parameters
    ----------
    sys : StateSpace
        Stable, p = m, without zeros on the unit circle.
    order : int
        States to keep.

    Returns
    -------
    reduced : StateSpace
    bound : float
        prod_{i > order} (1 + sigma_i) / (1 - sigma_i) - 1: the largest singular value of
        G^{-1}(z) (G(z) - G_r(z)) stays below it at every point of the unit circle. Infinite when
        a truncated sigma_i is 1 (a zero outside the unit circle costs that).

    Raises
    ------
    ValueError
        If sys is not stable, not square, has a zero on the unit circle, or the order is out of
        range.
    """
    require_stable(sys)
    _require_order(sys, order)
    if sys.p != sys.m:
        raise ValueError(f"sys must be square, got p={sys.p} outputs and m={sys.m} inputs")
    if sys.n == 0:
        return sys, 0.0
    A, B, C, D = _to_continuous(sys)
    # The relative error knows no units of the outputs: those in which D has rows of norm 1.
    unit = np.linalg.norm(D, axis=1)
    unit[unit == 0] = 1.0
    C, D = C / unit[:, None], D / unit[:, None]
    if np.linalg.cond(D) > 1 / (sys.m * EPS):
        raise ValueError("sys must have no zero on the unit circle, got one at z = -1")
    S = gramian_factor(sys.A, sys.B)
    # W has the state x, B_W = P C^T + B D^T, and Gramian w = min solution of
    # A^T w + w A + (C - B_W^T w)^T (D D^T)^{-1} (C - B_W^T w) = 0.
    B_W = S @ (S.T @ C.T) + B @ D.T
    try:
        w = solve_continuous_are(A, B_W, np.zeros_like(A), -(D @ D.T), s=-C.T)
    except (np.linalg.LinAlgError, ValueError) as error:
        raise ValueError("sys must have no zero on the unit circle") from error
    eigenvalues, Z = np.linalg.eigh((w + w.T) / 2)
    R = Z * np.sqrt(np.maximum(eigenvalues, 0))
    L, V, sigma = balancing_projection(S, R, order)
    reduced = _to_discrete(L @ A @ V, L @ B, unit[:, None] * (C @ V), unit[:, None] * D)
    cut = np.minimum(sigma[order:], 1.0)
    with np.errstate(divide="ignore"):
        bound = np.expm1(np.log1p(cut).sum() - np.log1p(-cut).sum())
    return reduced, float(bound)


def _to_continuous(sys: StateSpace) -> tuple[Array, Array, Array, Array]:
    """The system with G_c(s) = G(z), z = (1 + s) / (1 - s); both Gramians stay the same."""
    M = np.eye(sys.n) + sys.A
    A = np.linalg.solve(M, sys.A - np.eye(sys.n))
    B = np.sqrt(2) * np.linalg.solve(M, sys.B)
    C = np.sqrt(2) * np.linalg.solve(M.T, sys.C.T).T
    return A, B, C, sys.D - sys.C @ np.linalg.solve(M, sys.B)


def _to_discrete(A: Array, B: Array, C: Array, D: Array) -> StateSpace:
    """Inverse of `_to_continuous`."""
    M = np.eye(A.shape[0]) - A
    return StateSpace(
        np.linalg.solve(M, np.eye(A.shape[0]) + A),
        np.sqrt(2) * np.linalg.solve(M, B),
        np.sqrt(2) * np.linalg.solve(M.T, C.T).T,
        D + C @ np.linalg.solve(M, B),
    )
