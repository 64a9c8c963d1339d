"""From records to a model: N4SID, MOESP and CVA.

Each finds the state that carries the past into the future (`realization.subspace`), reads off it

    [ x_{t+1} ]   [ A  B ] [ x_t ]   [ w_t ]
    [   y_t   ] = [ C  D ] [ u_t ] + [ v_t ]         cov [w; v] = [Q S; S' R]

as a regression, and turns the residual covariance into a predictor by the Riccati equation,

    x_{t+1} = (A - K C) x_t + (B - K D) u_t + K y_t,     yhat_t = C x_t + D u_t.

B, D and x_0 enter yhat linearly, so they are finally set to minimize the one-step prediction error
over the record, which is what a predictor is for.

The methods differ in what they take for the state:

    n4sid   projections of the future on the past; A and C from their regression
    moesp   A and C from the shift structure of Gamma, Gamma[p:] = Gamma[:-p] A
    cva     n canonical variates of the past, the same function of the past at t and at t + 1

Glossary
    y (T, p), u (T, m)  record          n   order         i   block rows (past and future horizon)
    Gamma (i p, n)      observability   Z   projections of the future, in coordinates of Q
    K (n, p)            gain            Lambda (p, p)     covariance of the prediction error

Source: Van Overschee and De Moor (1996), algorithm 3 of chapter 4; Verhaegen and Verdult (2007),
chapters 9 and 10; Larimore, Canonical variate analysis (1990).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from realization import subspace
from realization.models import InnovationModel, symmetric_part
from realization.subspace import CompressedData
from realization.systems import Array, as_real_array

NOISE_FLOOR = 1e-13  # relative noise variance assumed at least, so that noise-free data have a gain
STABLE_RADIUS = 0.999  # where poles go that had to be moved inside the unit circle


# --- the three methods ----------------------------------------------------------------------------


def n4sid(
    y: ArrayLike,
    u: ArrayLike | None = None,
    *,
    order: int | None = None,
    block_rows: int | None = None,
    stable: bool = False,
) -> InnovationModel:
    """Identify a model by N4SID, from the regression of projected states.

    Parameters
    ----------
    y : array_like, shape (T, p)
        Outputs at equal steps, finite. Remove means first: a level is not a state.
    u : array_like, shape (T, m), optional
        Inputs. Left out, y is modelled as driven by noise alone; a record without noise gives the
        deterministic model, with Lambda at rounding level.
    order : int, optional
        Dimension n of the state, at most p (block_rows - 1); chosen by `select_order` when left
        out.
    block_rows : int, optional
        Horizon i of past and future. Left out: about 1.5 n / p + 5, at least 10, or 15 when the
        order is free, and less for short records.
    stable : bool
        Move eigenvalues of A on or outside the unit circle to modulus 0.999 before K, B, D and x_0
        are computed.

    Returns
    -------
    InnovationModel
        A, K, C, Lambda, with B and D when u is given, and x0, the state at the first sample.
        A - K C is stable. Lambda is the mean of e_t e_t' over the record.

    Raises
    ------
    ValueError
        If the record is too short, the inputs are not persistently exciting, an output does not
        vary, or a size is not as above.
    """
    return _identify(_n4sid_states, y, u, order, block_rows, stable)


def moesp(
    y: ArrayLike,
    u: ArrayLike | None = None,
    *,
    order: int | None = None,
    block_rows: int | None = None,
    stable: bool = False,
) -> InnovationModel:
    """Identify a model by (past-output) MOESP, from the shift structure of Gamma.

    Parameters, returns and errors are those of `n4sid`.
    """
    return _identify(_moesp_states, y, u, order, block_rows, stable)


def cva(
    y: ArrayLike,
    u: ArrayLike | None = None,
    *,
    order: int | None = None,
    block_rows: int | None = None,
    stable: bool = False,
) -> InnovationModel:
    """Identify a model by canonical variate analysis; efficient for noise-driven processes.

    Parameters, returns and errors are those of `n4sid`.

    Notes
    -----
    The state is the n combinations of the past most correlated with the future. Without inputs
    this is maximum likelihood for long records, if the block rows i outlast the predictor's memory:
    (A - K C)^i near 0. Where the last states are hardly seen in the record, N4SID and MOESP, which
    do not weigh the future by what can be predicted of it, can do much worse.
    """
    return _identify(_cva_states, y, u, order, block_rows, stable)


def estimate_order(
    y: ArrayLike, u: ArrayLike | None = None, *, block_rows: int | None = None
) -> tuple[int, Array]:
    """Order that the record supports, and the canonical correlations that say so.

    Parameters
    ----------
    y, u, block_rows
        As `n4sid`.

    Returns
    -------
    order : int
        See `realization.subspace.select_order`.
    correlations : ndarray, shape (block_rows * p,)
        Between past and future given the future inputs, descending.

    Raises
    ------
    ValueError
        As `n4sid`.
    """
    y, u, i = _checked_record(y, u, None, block_rows)
    u, _ = _in_units_of_size(u)
    data = subspace.compress(y / y.std(axis=0), u, i)
    correlations = subspace.canonical_correlations(data)
    return subspace.select_order(correlations, data.N, data.p, data.m), correlations


# --- states ---------------------------------------------------------------------------------------

# Each returns A, C and the residual covariance [Q S; S' R], with a floor in the units of the state.
States = Callable[[CompressedData, int], tuple[Array, Array, Array]]


def _n4sid_states(data: CompressedData, n: int) -> tuple[Array, Array, Array]:
    Gamma = subspace.n4sid_observability(data, n)
    X, X_next, U = _projected_states(data, Gamma)
    return _regress(data, X, X_next, U)


def _moesp_states(data: CompressedData, n: int) -> tuple[Array, Array, Array]:
    Gamma, p = subspace.moesp_observability(data, n), data.p
    A, C = np.linalg.lstsq(Gamma[:-p], Gamma[p:], rcond=None)[0], Gamma[:p]
    X, X_next, U = _projected_states(data, Gamma)
    return A, C, _regress(data, X, X_next, U)[2]


def _cva_states(data: CompressedData, n: int) -> tuple[Array, Array, Array]:
    """x_t = J [u_p; y_p], with the same J at t and at t + 1."""
    i, m, p, L = data.i, data.m, data.p, data.L
    J = subspace.canonical_variates(data, n)
    a, b = data.inputs, data.regressors
    Up, Yp = L[a : a + i * m], L[a + i * m : b]
    shifted = np.vstack([Up[m:], L[:m], Yp[p:], L[b : b + p]])
    return _regress(data, J @ L[a:b], J @ shifted, L[:m])


def _projected_states(data: CompressedData, Gamma: Array) -> tuple[Array, Array, Array]:
    """Gamma^+ Z_i, Gamma_{i-1}^+ Z_{i+1}, U_f: the first two are states up to terms in U_f."""
    b, p, L = data.regressors, data.p, data.L
    Z, Z_next = np.zeros_like(L[b:]), np.zeros_like(L[b + p :])
    Z[:, :b], Z_next[:, : b + p] = L[b:, :b], L[b + p :, : b + p]
    return np.linalg.pinv(Gamma) @ Z, np.linalg.pinv(Gamma[:-p]) @ Z_next, L[: data.inputs]


def _regress(data: CompressedData, X: Array, X_next: Array, U: Array) -> tuple[Array, Array, Array]:
    """[X_next; Y] = [A; C] X + (.) U + residual, by least squares in the coordinates of Q."""
    n, b = len(X), data.regressors
    targets = np.vstack([X_next, data.L[b : b + data.p]])
    regressors = np.vstack([X, U])
    coefficients = np.linalg.lstsq(regressors.T, targets.T, rcond=1e-12)[0].T
    residual = targets - coefficients @ regressors
    noise = residual @ residual.T + NOISE_FLOOR * np.diag(np.sum(targets**2, axis=1))
    return coefficients[:n, :n], coefficients[n:, :n], noise


# --- from states to a predictor -------------------------------------------------------------------


def _identify(
    states: States,
    y: ArrayLike,
    u: ArrayLike | None,
    order: int | None,
    block_rows: int | None,
    stable: bool,
) -> InnovationModel:
    y, u, i = _checked_record(y, u, order, block_rows)
    units = y.std(axis=0)
    y = y / units  # the methods weigh outputs by their size; the units of y must not matter,
    u, input_units = _in_units_of_size(u)  # nor those of u to the thresholds for rounding errors
    data = subspace.compress(y, u, i)
    if order is None:
        correlations = subspace.canonical_correlations(data)
        order = subspace.select_order(correlations, data.N, data.p, data.m)
    A, C, noise = states(data, order)
    if stable:
        A = stabilized(A)
    K, Lambda = predictor_gain(A, C, noise)
    B, D, x0, Lambda = fit_inputs(A, K, C, Lambda, y, u)
    Lambda = Lambda * np.outer(units, units)
    B, D = (None, None) if u is None else (B / input_units, D * units[:, None] / input_units)
    return InnovationModel(A, K / units, C * units[:, None], Lambda, B, D, x0)


def _in_units_of_size(u: Array | None) -> tuple[Array | None, Array]:
    """Inputs divided by their root mean square, and that (m,)."""
    if u is None:
        return None, np.ones(0)
    largest = np.abs(u).max(axis=0)
    largest[largest == 0] = 1.0  # an input that never moves: the check of excitation refuses it
    size = largest * np.sqrt(((u / largest) ** 2).mean(axis=0))
    size[size == 0] = 1.0
    return u / size, size


def predictor_gain(A: Array, C: Array, noise: Array) -> tuple[Array, Array]:
    """(K, Lambda) of the Kalman filter for cov [w; v] = noise, shapes (n, p) and (p, p).

    Raises
    ------
    ValueError
        If the Riccati equation has no stabilizing solution.
    """
    n = len(A)
    Q, S, R = noise[:n, :n], noise[:n, n:], noise[n:, n:]
    for solve in (_riccati_by_eigenvalues, _riccati_by_doubling):
        P = solve(A, C, Q, S, R)
        if not np.isfinite(P).all():
            continue
        Lambda = symmetric_part(C @ P @ C.T + R)
        K = np.linalg.solve(Lambda, (A @ P @ C.T + S).T).T
        if _is_contracting(A - K @ C):
            return K, Lambda
    raise ValueError(
        f"order={n} gives a model without a stabilizing Kalman gain (poles far outside the unit "
        "circle): use a lower order, more block rows, or stable=True"
    )


def _riccati_by_eigenvalues(A: Array, C: Array, Q: Array, S: Array, R: Array) -> Array:
    """P = A P A' + Q - (A P C' + S) (C P C' + R)^{-1} (.)', infinite where the method fails.

    Exact also for poles far outside the circle, but it must tell stable from unstable eigenvalues
    of a pencil, and cannot when the data have next to no noise.
    """
    try:
        return symmetric_part(scipy.linalg.solve_discrete_are(A.T, C.T, Q, R, s=S))
    except (np.linalg.LinAlgError, ValueError):
        return np.full_like(A, np.inf)


def _riccati_by_doubling(A: Array, C: Array, Q: Array, S: Array, R: Array) -> Array:
    """The same P as the limit of the filter's recursion, 2^k steps at a time.

        P = a' P (I + J P)^{-1} a + Q - S R^{-1} S',   a' = A - S R^{-1} C,   J = C' R^{-1} C

    It does not care how little noise there is, so it serves records without any. Overflow (poles
    far outside the circle) leaves infinities for the caller to see.
    """
    RS, RC = np.linalg.solve(R, S.T), np.linalg.solve(R, C)
    n, a, J = len(A), (A - S @ RC).T, C.T @ RC
    P = symmetric_part(Q - S @ RS)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(60):
            if not (np.isfinite(P).all() and np.isfinite(J).all()):
                return np.full_like(A, np.inf)
            inverse = np.linalg.solve(np.eye(n) + J @ P, np.hstack([a, J]))
            step = a.T @ P @ inverse[:, :n]
            P, J = symmetric_part(P + step), symmetric_part(J + a @ inverse[:, n:] @ a.T)
            a = a @ inverse[:, :n]
            if np.linalg.norm(step) <= 1e-16 * np.linalg.norm(P):
                return P
    return P


def _is_contracting(F: Array) -> bool:
    """True when powers of F do not blow up, in arithmetic as well as in its eigenvalues.

    Where F is far from normal its computed eigenvalues say little, so its powers are looked at.
    """
    if not np.isfinite(F).all() or np.abs(np.linalg.eigvals(F)).max() >= 1:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.linalg.norm(np.linalg.matrix_power(F, 4096)) < 1e6)


def fit_inputs(
    A: Array, K: Array, C: Array, Lambda: Array, y: Array, u: Array | None
) -> tuple[Array, Array, Array, Array]:
    """B, D and x_0 that minimize sum e_t' Lambda^{-1} e_t, and the mean of e_t e_t'.

    With F = A - K C and b = B - K D,  yhat = C (zI - F)^{-1} (b u + K y + x_0 delta) + D u.

    The row c of W C (W' W = Lambda^{-1}) meets column j of b through (zI - F')^{-1} c' u_j, one
    recursion for all n entries of that column.
    """
    (T, p), n = y.shape, len(A)
    F = A - K @ C
    W = np.linalg.inv(np.linalg.cholesky(Lambda))
    WC = W @ C
    free = y - _states_side_by_side(F, (y @ K.T)[None])[0] @ C.T
    m = 0 if u is None else u.shape[1]
    regressors = np.empty((p, T, n + m * n + p * m))
    regressors[:, :, :n] = _decays(F.T, WC, T)
    if m:
        regressors[:, :, n : n + m * n] = _input_responses(F.T, WC, u).reshape(p, T, m * n)
        direct = W[:, None, :, None] * u[None, :, None, :]
        regressors[:, :, n + m * n :] = direct.reshape(p, T, p * m)
    theta, residual = _least_squares(regressors, W @ free.T)
    x0, b, D = theta[:n], theta[n : n + m * n].reshape(m, n).T, theta[n + m * n :].reshape(p, m)
    e = np.linalg.inv(W) @ residual
    return b + K @ D, D, x0, symmetric_part(e @ e.T / T)


def _decays(F: Array, x: Array, T: int) -> Array:
    """F^t x for t = 0 .. T - 1 and each row of x (r, n), by doubling; shape (r, T, n)."""
    out = np.zeros((len(x), T, x.shape[1]))
    out[:, 0] = x
    power, done = F, 1
    while done < T and np.linalg.norm(power) > 1e-20:  # what is smaller than that stays zero
        stop = min(2 * done, T)
        out[:, done:stop] = out[:, : stop - done] @ power.T
        power, done = power @ power, stop
    return out


def _input_responses(F: Array, g: Array, u: Array) -> Array:
    """x_0 .. x_{T-1} of x_{t+1} = F x_t + g_k u_{tj}, x_0 = 0, for g (r, n), u (T, m).

    Shape (r, T, m, n). Sixteen steps at a time: inside a block one product with the responses
    F^t g_k; from block to block a recursion with F^16 for all k and j side by side.
    """
    (T, m), (r, n), L = u.shape, g.shape, 16
    blocks = -(-T // L)
    powers, toeplitz = _powers(F, L), np.zeros((L, r, L + 1, n))
    responses = np.einsum("tij,rj->rti", powers, g)
    for early in range(L):
        toeplitz[early, :, early + 1 :] = responses[:, : L - early]
    u = np.concatenate([u, np.zeros((blocks * L - T, m))]).reshape(blocks, L, m)
    x = u.transpose(0, 2, 1).reshape(blocks * m, L) @ toeplitz.reshape(L, r * (L + 1) * n)
    x = x.reshape(blocks, m * r, L + 1, n)
    ends = np.ascontiguousarray(x[:, :, L].transpose(1, 0, 2))
    first = _states_side_by_side(powers[L], ends).transpose(1, 0, 2)
    carried = first.reshape(-1, n) @ powers[:L].transpose(2, 0, 1).reshape(n, L * n)
    x = x[:, :, :L] + carried.reshape(blocks, m * r, L, n)
    x = x.reshape(blocks, m, r, L, n).transpose(2, 0, 3, 1, 4)
    return x.reshape(r, blocks * L, m, n)[:, :T]


def _states_side_by_side(F: Array, w: Array) -> Array:
    """x_0 .. x_{T-1} of x_{t+1} = F x_t + w_t from x_0 = 0, for records w (r, T, n).

    Eight steps at a time: inside a block of eight one product with the block Toeplitz matrix of
    powers of F; from block to block the same recursion with F^8.
    """
    (r, T, n), L = w.shape, 8
    blocks = -(-T // L)
    powers, toeplitz = _powers(F, L), np.zeros((L, n, L + 1, n))
    for early in range(L):
        toeplitz[early, :, early + 1 :] = powers[: L - early].transpose(2, 0, 1)
    w = np.concatenate([w, np.zeros((r, blocks * L - T, n))], axis=1)
    x = w.reshape(r * blocks, L * n) @ toeplitz.reshape(L * n, (L + 1) * n)
    x = x.reshape(r, blocks, L + 1, n)
    if blocks > 1:
        first = _states_side_by_side(powers[L], np.ascontiguousarray(x[:, :, L]))
        carried = first.reshape(-1, n) @ powers[:L].transpose(2, 0, 1).reshape(n, L * n)
        x = x[:, :, :L] + carried.reshape(r, blocks, L, n)
    return x[:, :, :L].reshape(r, blocks * L, n)[:, :T]


def _powers(F: Array, L: int) -> Array:
    """I, F, .., F^L, shape (L + 1, n, n)."""
    powers = np.empty((L + 1, *F.shape))
    powers[0] = np.eye(len(F))
    for t in range(L):
        powers[t + 1] = powers[t] @ F
    return powers


def _least_squares(regressors: Array, target: Array) -> tuple[Array, Array]:
    """theta (d,) and residual (p, T) for target (p, T), regressors (p, T, d).

    Normal equations with scaled columns and a refinement: as accurate as QR for conditions up to
    about 1e7, and a fraction of its cost. Directions without information are set to zero.
    """
    gram = sum(block.T @ block for block in regressors)
    scale = 1 / np.sqrt(np.maximum(np.diag(gram), np.finfo(float).tiny))
    values, vectors = np.linalg.eigh(gram * np.outer(scale, scale))
    inverse = np.where(values > 1e-13 * values[-1], 1 / np.maximum(values, 1e-300), 0.0)
    theta, residual = np.zeros(len(gram)), target
    for _ in range(2):
        score = sum(r @ block for block, r in zip(regressors, residual))
        theta = theta + scale * (vectors @ (inverse * (vectors.T @ (scale * score))))
        residual = target - np.array([block @ theta for block in regressors])
    return theta, residual


def stabilized(A: ArrayLike, radius: float = STABLE_RADIUS) -> Array:
    """A with every eigenvalue of modulus >= 1 moved radially to `radius`, the others kept.

    Parameters
    ----------
    A : array_like, shape (n, n)
        State transition.
    radius : float
        New modulus, in (0, 1).

    Returns
    -------
    ndarray, shape (n, n)
        In real Schur form each diagonal block that is too large is scaled, so invariant subspaces
        of the leading blocks are kept too.
    """
    A = as_real_array("A", A, 2)
    if not 0 < radius < 1:
        raise ValueError(f"radius must lie in (0, 1), got {radius}")
    T, Z = scipy.linalg.schur(A, output="real")
    k = 0
    while k < len(T):
        size = 2 if k + 1 < len(T) and T[k + 1, k] != 0 else 1
        block = T[k : k + size, k : k + size]
        modulus = np.abs(np.linalg.eigvals(block)).max()
        if modulus >= 1:
            block *= radius / modulus
        k += size
    return Z @ T @ Z.T


def _checked_record(
    y: ArrayLike, u: ArrayLike | None, order: int | None, block_rows: int | None
) -> tuple[Array, Array | None, int]:
    y = as_real_array("y", y, 2)
    T, p = y.shape
    if T < 1 or p < 1:
        raise ValueError(f"y must have shape (T >= 1, p >= 1), got {y.shape}")
    if u is not None:
        u = as_real_array("u", u, 2)
        if len(u) != T or u.shape[1] < 1:
            raise ValueError(f"u must have shape (T={T}, m >= 1), got {u.shape}")
    if (np.ptp(y, axis=0) == 0).any():
        raise ValueError(f"y must vary: output {int(np.argmin(np.ptp(y, axis=0)))} is constant")
    m = 0 if u is None else u.shape[1]
    if block_rows is None:
        block_rows = subspace.default_block_rows(T, p, m, order)
    subspace.checked_sizes(T, p, order, block_rows)
    return y, u, block_rows
