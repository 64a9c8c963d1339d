"""Kalman filter: the conditional mean of the state given the past, computed step by step.

For a model of `realization.models` (noise covariances Q, S, R) with prior x_0 ~ (x0, P0):

    e_t     = y_t - C x_t - D u_t                        innovation, white, covariance F_t
    F_t     = C P_t C' + R
    K_t     = (A P_t C' + S) F_t^{-1}
    x_{t+1} = A x_t + B u_t + K_t e_t                    predicted state
    P_{t+1} = A P_t A' + Q - K_t F_t K_t'                its error covariance (Riccati equation)
    log p(y) = -1/2 sum_t [ p log 2 pi + log det F_t + e_t' F_t^{-1} e_t ]

Only the second group of equations sees data, and the gains do not. So the filter first lays out the
gains as *stretches* of time on which they are constant, and then runs the data through: where P_t
has converged a stretch reaches to the next missing value, and costs a linear recursion instead of a
loop. The result is that of the loop, to rounding.

Glossary
    y (T, p), u (T, m)  data; NaN in y marks a missing entry    x (n,)    predicted state
    P (n, n)            covariance of the prediction error      K (n, p)  gain
    F (p, p)            covariance of the innovation e (p,)     W (p, p)  whitener, W' W = F^{-1}

Source: Anderson and Moore, Optimal Filtering (1979); de Jong, The diffuse Kalman filter (1991);
Kailath, Sayed and Hassibi, Linear Estimation (2000), chapter 12 (square-root arrays).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from realization.gains import (
    Step,
    Stretch,
    gain_schedule,
    natural_units,
    riccati_step,
    scaled_noises,
    square_root_step,
    whitener,
)
from realization.models import (
    InnovationModel,
    Mask,
    StochasticModel,
    checked_inputs,
    state_covariance,
    symmetric_part,
)
from realization.systems import Array, as_real_array, linear_recursion

OBSERVABLE = 1e-10  # reciprocal condition of the information on x_0 at which it counts as known


@dataclass(frozen=True, eq=False, repr=False)
class FilterResult:
    """What the filter knows at each time.

    Attributes
    ----------
    innovations : ndarray, shape (T, p)
        y_t minus its prediction; NaN where y is missing, and in the first steps of a diffuse start.
    innovation_covariances : ndarray, shape (T, p, p)
        F_t, for all entries, missing ones included.
    loglik : float
        Gaussian log-likelihood of the observed entries, natural logarithm.
    states, covariances : ndarrays, shapes (T, n) and (T, n, n)
        Mean and covariance of x_t given y_0 .. y_{t-1}.
    filtered_states : ndarray, shape (T, n)
        Mean of x_t given y_0 .. y_t.
    predictions : ndarray, shape (T, p)
        Mean of y_t given y_0 .. y_{t-1}, also where y_t is missing.
    next_state, next_covariance : ndarrays, shapes (n,) and (n, n)
        Mean and covariance of x_T given the whole record: where a forecast starts.
    x0 : ndarray, shape (n,)
        The first state that was used: given, or estimated from the record.
    """

    innovations: Array
    innovation_covariances: Array
    loglik: float
    states: Array
    covariances: Array
    filtered_states: Array
    predictions: Array
    next_state: Array
    next_covariance: Array
    x0: Array

    def __repr__(self) -> str:
        T, p = self.innovations.shape
        return f"FilterResult(T={T}, p={p}, n={self.states.shape[1]}, loglik={self.loglik:.6g})"

    @property
    def standardized(self) -> Array:
        """Innovations divided by the Cholesky factor of F_t, complete rows only, shape (T', p)."""
        rows = np.isfinite(self.innovations).all(axis=1)
        factors = np.linalg.cholesky(self.innovation_covariances[rows])
        return np.linalg.solve(factors, self.innovations[rows, :, None])[:, :, 0]


# --- the public filters ---------------------------------------------------------------------------


def kalman_filter(
    model: StochasticModel,
    y: ArrayLike,
    u: ArrayLike | None = None,
    x0: ArrayLike | str | None = None,
    P0: ArrayLike | None = None,
) -> FilterResult:
    """Run the time-varying Kalman filter over a record.

    Parameters
    ----------
    model : InnovationModel or StochasticRealization
        The model; Q, S, R may be correlated noises.
    y : array_like, shape (T, p)
        Outputs, T >= 1; NaN marks a missing entry, any pattern.
    u : array_like, shape (T, m), optional
        Inputs, finite; needed exactly when the model has inputs.
    x0 : array_like (n,), "stationary", "estimate" or "diffuse", optional
        What is known of the first state. An array: its mean, with covariance P0 (zero: known).
        "stationary": mean 0 and the covariance of the noise-driven state, for stable A.
        "estimate": fixed but unknown, set to its maximum-likelihood value on this record (the
        likelihood is then the profile likelihood). "diffuse": infinite prior variance; innovations
        and states are NaN until the outputs have determined the state, and the likelihood is the
        diffuse one, lim log p + (n/2) log k under the prior variance k I.
        Left out: "stationary" for a stable model without inputs, "estimate" otherwise. A model's
        own x0 belongs to the record it was identified on; pass x0=model.x0 for that record.
    P0 : array_like, shape (n, n), optional
        Covariance of the first state; only with an array x0.

    Returns
    -------
    FilterResult

    Raises
    ------
    ValueError
        If shapes do not fit, a value is infinite, an F_t is singular, or "diffuse" finds a state
        that the outputs never determine.
    """
    return _filter(riccati_step, model, y, u, x0, P0)


def square_root_filter(
    model: StochasticModel,
    y: ArrayLike,
    u: ArrayLike | None = None,
    x0: ArrayLike | str | None = None,
    P0: ArrayLike | None = None,
) -> FilterResult:
    """The same filter, propagating a square root of P_t: for nearly singular F_t or stiff noises.

    Parameters, returns and errors are those of `kalman_filter`. It costs about twice as much before
    convergence, and keeps twice the digits of small covariances.
    """
    return _filter(square_root_step, model, y, u, x0, P0)


def steady_state_filter(
    model: StochasticModel,
    y: ArrayLike,
    u: ArrayLike | None = None,
    x0: ArrayLike | str | None = None,
) -> FilterResult:
    """Run the filter with the constant gain of `steady_state_gain`, exact once P_t has converged.

    Parameters
    ----------
    model, y, u
        As `kalman_filter`; y must have no missing entry.
    x0 : array_like (n,) or "estimate", optional
        First predicted state; zero when left out, fitted to the record for "estimate".

    Returns
    -------
    FilterResult
        `loglik` is that of the constant-gain predictor.

    Raises
    ------
    ValueError
        If y has missing entries, shapes do not fit, no stabilizing gain exists, or the innovation
        covariance is singular.
    """
    y, u, seen = _checked_data(model, y, u)
    if not seen.all():
        raise ValueError("y must have no missing entries here; use kalman_filter for such records")
    K, F, P = steady_state_gain(model)
    W = whitener(F)
    schedule = [Stretch(0, len(y), P, K, W, -float(np.log(np.diag(W)).sum()), model.p)]
    if isinstance(x0, str) and x0 == "estimate":
        x0 = _estimated_state(model, schedule, y, u)
    elif isinstance(x0, str):
        raise ValueError(f"x0 must be an array or 'estimate' here, got {x0!r}")
    mean = np.zeros(model.n) if x0 is None else _checked_state(model, x0)
    return _assemble(model, schedule, P, y, u, mean)


def log_likelihood(
    model: StochasticModel,
    y: ArrayLike,
    u: ArrayLike | None = None,
    x0: ArrayLike | str | None = None,
    P0: ArrayLike | None = None,
) -> float:
    """Gaussian log-likelihood of a record, `kalman_filter(...).loglik` without the rest.

    Parameters, conventions and errors are those of `kalman_filter`. After P_t has converged a step
    costs a few multiplications, in memory proportional to T (n + p).

    Returns
    -------
    float
        Natural logarithm of the density of the observed entries.
    """
    y, u, seen = _checked_data(model, y, u)
    schedule, mean, _, extra = _plan(riccati_step, model, y, u, seen, x0, P0)
    _, e, _ = _run(model, schedule, y, u, mean)
    return extra + _loglik(schedule, e)


def steady_state_gain(model: StochasticModel) -> tuple[Array, Array, Array]:
    """The constant gain: the stabilizing solution of the Riccati equation.

    Parameters
    ----------
    model : InnovationModel or StochasticRealization
        Detectable, without noise-free modes on the unit circle.

    Returns
    -------
    K, Lambda, P : ndarrays, shapes (n, p), (p, p), (n, n)
        Gain, innovation covariance, covariance of the state's prediction error.

    Raises
    ------
    ValueError
        If no stabilizing solution exists.
    """
    A, C, n = model.A, model.C, model.n
    if isinstance(model, InnovationModel):
        closed = np.abs(np.linalg.eigvals(A - model.K @ C)).max(initial=0.0)
        if closed < 1:  # the state is a function of the past outputs: nothing left to predict
            return model.K, model.Lambda, np.zeros((n, n))
    if n == 0:
        return np.zeros((0, model.p)), model.R, np.zeros((0, 0))
    # Units of state and output in which the noises and what they excite are of size 1: the solver's
    # thresholds know of no others.
    x, y = natural_units(model)
    a, c, q, r, s = A * x / x[:, None], C * x / y[:, None], *scaled_noises(model, x, y)
    try:
        P = scipy.linalg.solve_discrete_are(a.T, c.T, q, r, s=s)
    except (np.linalg.LinAlgError, ValueError) as error:
        raise ValueError(
            "model must be detectable, with R positive definite and no noise-free mode on the unit "
            "circle: the Riccati equation has no stabilizing solution"
        ) from error
    F = symmetric_part(c @ P @ c.T + r)
    K = np.linalg.solve(F, (a @ P @ c.T + s).T).T
    return K * x[:, None] / y, F * np.outer(y, y), symmetric_part(P) * np.outer(x, x)


def innovation_form(model: StochasticModel) -> InnovationModel:
    """The innovation model with the same outputs: (A, K, C, Lambda) of `steady_state_gain`."""
    K, Lambda, _ = steady_state_gain(model)
    return InnovationModel(model.A, K, model.C, Lambda, model.B, model.D)


# --- data: the part that sees no covariance -------------------------------------------------------


def _run(
    model: StochasticModel, schedule: list[Stretch], y: Array, u: Array | None, x0: Array
) -> tuple[Array, Array, Array]:
    """States (T' + 1, n), innovations (T', p) with 0 where missing, predictions (T', p)."""
    first, stop = schedule[0].start, schedule[-1].stop
    A, C = model.A, model.C
    direct = np.zeros_like(y) if u is None else u @ model.D.T
    drive = np.zeros((len(y), model.n)) if u is None else u @ model.B.T
    known = np.where(np.isfinite(y), y, 0.0) - direct
    x = np.empty((stop - first + 1, model.n))
    x[0] = x0
    for s in schedule:
        a, b = s.start - first, s.stop - first
        if b == a + 1:
            e = known[s.start] - C @ x[a]
            x[b] = A @ x[a] + drive[s.start] + s.K @ e
        else:
            w = known[s.start : s.stop] @ s.K.T + drive[s.start : s.stop]
            x[a : b + 1] = linear_recursion(A - s.K @ C, w, x[a])
    predictions = x[:-1] @ C.T + direct[first:stop]
    innovations = np.where(np.isfinite(y[first:stop]), y[first:stop] - predictions, 0.0)
    return x, innovations, predictions


def _loglik(schedule: list[Stretch], e: Array) -> float:
    """-1/2 sum of count log 2 pi + log det F + e' F^{-1} e, over the schedule; e starts with it."""
    first, total = schedule[0].start, 0.0
    for s in schedule:
        white = e[s.start - first : s.stop - first] @ s.W.T
        steps = s.stop - s.start
        total += steps * (s.count * np.log(2 * np.pi) / 2 + s.half_logdet)
        total += 0.5 * float(np.vdot(white, white))
    return -total


def _information(model: StochasticModel, schedule: list[Stretch], e: Array) -> tuple[Array, Array]:
    """(r, N): r = sum Phi_t' C' F_t^{-1} e_t and N = sum Phi_t' C' F_t^{-1} C Phi_t, backwards.

    Phi_t carries an error of x_0 to time t, so e_t(x_0) = e_t(0) - C Phi_t x_0 and the likelihood
    of x_0 is that of a linear regression with normal equations N x_0 = r.
    """
    first, n = schedule[0].start, model.n
    r, N = np.zeros(n), np.zeros((n, n))
    for s in reversed(schedule):
        closed = model.A - s.K @ model.C
        WC = s.W @ model.C
        scores = e[s.start - first : s.stop - first] @ (s.W.T @ WC)
        r = linear_recursion(closed.T, np.ascontiguousarray(scores[::-1]), r)[-1]
        power, gramian = _finite_gramian(closed, WC.T @ WC, s.stop - s.start)
        N = gramian + power.T @ N @ power
    return r, symmetric_part(N)


def _finite_gramian(F: Array, Q: Array, k: int) -> tuple[Array, Array]:
    """(F^k, sum_{j<k} F'^j Q F^j) in log2(k) doublings."""
    power, total = F, Q
    for bit in bin(k)[3:]:
        power, total = power @ power, total + power.T @ total @ power
        if bit == "1":
            power, total = power @ F, Q + F.T @ total @ F
    return power, total


def _estimated_state(
    model: StochasticModel, schedule: list[Stretch], y: Array, u: Array | None
) -> Array:
    """Maximum-likelihood x_0; directions on which the record says nothing are left at zero."""
    _, e, _ = _run(model, schedule, y, u, np.zeros(model.n))
    r, N = _information(model, schedule, e)
    size = np.sqrt(np.diag(N))  # what counts as nothing is decided where N has a unit diagonal
    size[size == 0] = 1.0
    return scipy.linalg.pinvh(N / np.outer(size, size), rtol=1e-13) @ (r / size) / size


# --- the first state ------------------------------------------------------------------------------


def _plan(
    step: Step,
    model: StochasticModel,
    y: Array,
    u: Array | None,
    seen: Mask,
    x0: ArrayLike | str | None,
    P0: ArrayLike | None,
) -> tuple[list[Stretch], Array, Array, float]:
    """(schedule, state and covariance after it, log-likelihood of what precedes the schedule)."""
    n = model.n
    stable = np.abs(np.linalg.eigvals(model.A)).max(initial=0.0) < 1
    if x0 is None:
        x0 = "stationary" if stable and model.m == 0 else "estimate"
    if isinstance(x0, str) and P0 is not None:
        raise ValueError(f"P0 needs an array x0, got x0={x0!r}")
    if not isinstance(x0, str):
        mean = _checked_state(model, x0)
        P = np.zeros((n, n)) if P0 is None else _checked_covariance(P0, n)
        schedule, P = gain_schedule(step, model, P, seen)
        return schedule, mean, P, 0.0
    if x0 == "stationary":
        schedule, P = gain_schedule(step, model, state_covariance(model), seen)
        return schedule, np.zeros(n), P, 0.0
    if x0 == "estimate":
        schedule, P = gain_schedule(step, model, np.zeros((n, n)), seen)
        return schedule, _estimated_state(model, schedule, y, u), P, 0.0
    if x0 == "diffuse":
        return _diffuse_start(step, model, y, u, seen)
    raise ValueError(f"x0 must be an array, 'stationary', 'estimate' or 'diffuse', got {x0!r}")


def _diffuse_start(
    step: Step, model: StochasticModel, y: Array, u: Array | None, seen: Mask
) -> tuple[list[Stretch], Array, Array, float]:
    """Run from a fixed x_0 until the outputs determine it, then continue from its posterior."""
    n = model.n
    schedule, P = gain_schedule(step, model, np.zeros((n, n)), seen)
    if n == 0:
        return schedule, np.zeros(0), P, 0.0
    Phi, N, steps = np.eye(n), np.zeros((n, n)), 0
    for s in schedule:  # the information on x_0 grows until it determines x_0
        closed, WC = model.A - s.K @ model.C, s.W @ model.C
        while steps < s.stop and not _is_definite(N):
            scores = WC @ Phi
            N, Phi, steps = N + scores.T @ scores, closed @ Phi, steps + 1
    if steps == len(y):
        raise ValueError(
            "x0='diffuse' needs outputs that determine the state before the record ends; these "
            f"{steps} do not"
        )
    head, P = gain_schedule(step, model, np.zeros((n, n)), seen[:steps])
    x, e, _ = _run(model, head, y, u, np.zeros(n))
    r, N = _information(model, head, e)
    x_0 = np.linalg.solve(N, r)
    loglik = _loglik(head, e) + 0.5 * float(r @ x_0) - 0.5 * np.linalg.slogdet(N)[1]
    P = symmetric_part(P + Phi @ np.linalg.solve(N, Phi.T))
    tail, P = gain_schedule(step, model, P, seen, start=steps)
    return tail, x[-1] + Phi @ x_0, P, float(loglik)


def _is_definite(N: Array) -> bool:
    """True when N is far from singular, in the units in which its diagonal is 1."""
    size = np.sqrt(np.diag(N))
    return bool(size.all() and 1 / np.linalg.cond(N / np.outer(size, size)) > OBSERVABLE)


# --- putting the result together ------------------------------------------------------------------


def _filter(
    step: Step,
    model: StochasticModel,
    y: ArrayLike,
    u: ArrayLike | None,
    x0: ArrayLike | str | None,
    P0: ArrayLike | None,
) -> FilterResult:
    y, u, seen = _checked_data(model, y, u)
    schedule, mean, P, extra = _plan(step, model, y, u, seen, x0, P0)
    return _assemble(model, schedule, P, y, u, mean, extra)


def _assemble(
    model: StochasticModel,
    schedule: list[Stretch],
    P_last: Array,
    y: Array,
    u: Array | None,
    mean: Array,
    extra: float = 0.0,
) -> FilterResult:
    T, n, p, first = len(y), model.n, model.p, schedule[0].start
    x, e, predictions = _run(model, schedule, y, u, mean)
    P, F = np.full((T, n, n), np.nan), np.full((T, p, p), np.nan)
    filtered = np.full((T, n), np.nan)
    for s in schedule:
        a, b = s.start - first, s.stop - first
        P[s.start : s.stop] = s.P
        F[s.start : s.stop] = model.C @ s.P @ model.C.T + model.R
        filtered[s.start : s.stop] = x[a:b] + e[a:b] @ (s.P @ model.C.T @ s.W.T @ s.W).T
    innovations = np.where(np.isfinite(y[first:]), e, np.nan)
    pad = ((first, 0), (0, 0))
    return FilterResult(
        innovations=np.pad(innovations, pad, constant_values=np.nan),
        innovation_covariances=F,
        loglik=extra + _loglik(schedule, e),
        states=np.pad(x[:-1], pad, constant_values=np.nan),
        covariances=P,
        filtered_states=filtered,
        predictions=np.pad(predictions, pad, constant_values=np.nan),
        next_state=x[-1],
        next_covariance=P_last,
        x0=mean if first == 0 else np.full(n, np.nan),
    )


# --- checks ---------------------------------------------------------------------------------------


def _checked_data(
    model: StochasticModel, y: ArrayLike, u: ArrayLike | None
) -> tuple[Array, Array | None, Mask]:
    if np.iscomplexobj(y):
        raise ValueError("y must be real, got complex numbers")
    y = np.array(y, dtype=np.float64)
    if y.ndim != 2 or y.shape[0] < 1 or y.shape[1] != model.p:
        raise ValueError(f"y must have shape (T >= 1, p={model.p}), got {y.shape}")
    if np.isinf(y).any():
        raise ValueError("y must be finite or NaN (missing), got infinity")
    return y, checked_inputs(model, u, len(y)), ~np.isnan(y)


def _checked_state(model: StochasticModel, x0: ArrayLike) -> Array:
    x0 = as_real_array("x0", x0, 1)
    if x0.shape != (model.n,):
        raise ValueError(f"x0 must have shape ({model.n},), got {x0.shape}")
    return x0


def _checked_covariance(P0: ArrayLike, n: int) -> Array:
    P0 = as_real_array("P0", P0, 2)
    if P0.shape != (n, n) or not np.allclose(P0, P0.T):
        raise ValueError(f"P0 must be a symmetric {(n, n)} covariance, got shape {P0.shape}")
    if n and np.linalg.eigvalsh(P0)[0] < -1e-10 * np.abs(P0).max():
        raise ValueError("P0 must be positive semidefinite")
    return symmetric_part(P0)
