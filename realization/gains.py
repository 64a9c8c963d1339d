"""The half of the Kalman filter that sees no data: the sequence of its gains.

    F_t     = C P_t C' + R                     innovation covariance
    K_t     = (A P_t C' + S) F_t^{-1}          gain
    P_{t+1} = A P_t A' + Q - K_t F_t K_t'      covariance of the state's prediction error

Two ways to make one step, `riccati_step` and `square_root_step`, and one loop, `gain_schedule`,
that groups the steps into stretches of constant gain. A missing output is a row left out of C, R
and S, so that K and the whitener W are zero there.

Glossary
    P (n, n)   covariance of x_t given y_0 .. y_{t-1}      seen (p,) bool   outputs present at t
    K (n, p)   gain                                        W (p, p)         W' W = F^{-1}

Source: Anderson and Moore, Optimal Filtering (1979), chapter 3; Kailath, Sayed and Hassibi, Linear
Estimation (2000), chapter 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from realization.models import Mask, StochasticModel
from realization.systems import Array

CONVERGED = 1e-14  # what an entry of P_t may still move, in units of P + Q, when a stretch starts
EPS = float(np.finfo(float).eps)  # below this no step changes P_t


@dataclass(frozen=True, eq=False, slots=True)
class Stretch:
    """Steps start .. stop-1 of one P, K, W; half_logdet = log det(F) / 2, count of entries."""

    start: int
    stop: int
    P: Array
    K: Array
    W: Array
    half_logdet: float
    count: int


Step = Callable[[StochasticModel, Array, Mask], tuple[Array, Array, Array]]


def riccati_step(model: StochasticModel, P: Array, seen: Mask) -> tuple[Array, Array, Array]:
    """(K, W, P_{t+1}) from P_t, with only the outputs `seen` (p,) bool observed.

    P_{t+1} is computed in Joseph's form (A - K C) P (A - K C)' + [I -K] [Q S; S' R] [I -K]', a sum
    of positive semidefinite terms.
    """
    C, S, R = model.C[seen], model.S[:, seen], model.R[np.ix_(seen, seen)]
    CP = C @ P
    W = inverse_lower(np.linalg.cholesky(CP @ C.T + R))
    K = ((model.A @ CP.T + S) @ W.T) @ W
    closed = model.A - K @ C
    SK = S @ K.T
    P = closed @ P @ closed.T + model.Q - SK - SK.T + K @ R @ K.T
    return _scatter(K, seen), _scatter(_scatter(W, seen).T, seen).T, (P + P.T) / 2


def square_root_step(
    model: StochasticModel, P_root: Array, seen: Mask
) -> tuple[Array, Array, Array]:
    """(K, W, P_{t+1}^{1/2}) from P_t^{1/2}, by one orthogonal triangularization.

        [ C P^{1/2}  N_v ]          [ F^{1/2}    0           ]
        [ A P^{1/2}  N_w ] Theta =  [ K F^{1/2}  P_+^{1/2}   ],    N N' = [R S'; S Q]

    The covariance is never formed, so it cannot lose symmetry or positivity.
    """
    p = int(seen.sum())
    noise = np.block([[model.R, model.S.T], [model.S, model.Q]])
    keep = np.concatenate([seen, np.ones(model.n, bool)])
    N = pivoted_root(noise[np.ix_(keep, keep)])
    array = np.hstack([np.vstack([model.C[seen] @ P_root, model.A @ P_root]), N])
    lower = np.linalg.qr(array.T, mode="r").T
    F_root = lower[:p, :p] * np.sign(np.diag(lower)[:p])
    if p and np.abs(np.diag(F_root)).min() == 0:
        raise np.linalg.LinAlgError("singular innovation covariance")
    W = inverse_lower(F_root)
    K = (lower[p:, :p] * np.sign(np.diag(lower)[:p])) @ W
    return _scatter(K, seen), _scatter(_scatter(W, seen).T, seen).T, lower[p:, p:]


def pivoted_root(M: Array) -> Array:
    """N with N N' = M, for M positive semidefinite; shape of M.

    Cholesky's factor, largest remaining variance first. An eigenvector would mix entries in
    different units, and the small ones would drown in the rounding errors of the large ones.
    """
    rest, N = M.copy(), np.zeros_like(M)
    floor = len(M) * EPS * np.diag(M)
    for k in range(len(M)):
        left = np.where(np.diag(rest) > floor, np.diag(rest), 0.0)
        i = int(left.argmax())
        if left[i] <= 0:
            break
        N[:, k] = rest[:, i] / np.sqrt(rest[i, i])
        rest -= np.outer(N[:, k], N[:, k])
        rest[i], rest[:, i] = 0.0, 0.0
    return N


def natural_units(model: StochasticModel) -> tuple[Array, Array]:
    """Standard deviations of the states that n steps of noise excite, and of their outputs.

    A state that no noise excites gets a unit from the size of what it does to the outputs.
    """
    A, C, n = model.A, model.C, model.n
    W = model.Q
    growth = max(1.0, float(np.linalg.norm(A, 2))) if n else 1.0
    for _ in range(n):
        W = model.Q + A @ W @ A.T / growth**2
    x, y = np.sqrt(np.abs(np.diag(W))), np.sqrt(np.abs(np.diag(C @ W @ C.T + model.R)))
    y = np.where(y > 0, y, 1.0)
    loudness = np.linalg.norm(C / y[:, None], axis=0)
    idle = np.divide(1.0, loudness, out=np.ones(n), where=loudness > 0)
    return np.where(x > 0, x, idle), y


def scaled_noises(model: StochasticModel, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Q, R, S with states in units x (n,) and outputs in units y (p,)."""
    return model.Q / np.outer(x, x), model.R / np.outer(y, y), model.S / np.outer(x, y)


def inverse_lower(L: Array) -> Array:
    """The inverse of a lower triangular matrix (n, n), which may be empty."""
    if L.shape[0] == 0:
        return L
    return scipy.linalg.lapack.dtrtri(L, lower=1)[0]


def whitener(F: Array) -> Array:
    """Lower triangular W (p, p) with W' W = F^{-1}; ValueError for a singular covariance F."""
    try:
        return inverse_lower(np.linalg.cholesky(F))
    except np.linalg.LinAlgError as error:
        raise ValueError("the innovation covariance must be positive definite") from error


def _scatter(M: Array, seen: Mask) -> Array:
    """Columns of M put where `seen` is true, zeros elsewhere."""
    if seen.all():
        return M
    out = np.zeros((M.shape[0], seen.size))
    out[:, seen] = M
    return out


def gain_schedule(
    step: Step, model: StochasticModel, P: Array, seen: Mask, start: int = 0
) -> tuple[list[Stretch], Array]:
    """Stretches that cover start .. T-1, and the covariance after the last step."""
    T = len(seen)
    rooted = step is square_root_step
    carried = pivoted_root(P) if rooted else P
    # Runs of one pattern of missing entries; inside a run the covariance converges.
    changes = (seen[start + 1 :] != seen[start:-1]).any(axis=1)
    edges = (1 + start + np.flatnonzero(changes)).tolist()
    # Every entry of P_t is measured in units of its own: a slow state in small units counts too.
    variance = np.diag(model.Q)
    if not variance.all():
        variance = np.where(variance > 0, variance, natural_units(model)[0] ** 2)
    stretches = []
    for first, last in zip([start, *edges], [*edges, T]):
        t = first
        while t < last:
            try:
                K, W, following = step(model, carried, seen[first])
            except np.linalg.LinAlgError as error:
                raise ValueError(
                    f"the innovation covariance must be positive definite, it is singular at t={t}"
                ) from error
            P_next = following @ following.T if rooted else following
            size = np.sqrt(P_next.diagonal() + variance)
            moved = float(np.abs((P_next - P) / size / size[:, None]).max(initial=0.0))
            settled = _is_settled(moved, model.A - K @ model.C)
            stop = last if settled else t + 1
            diagonal = np.diag(W)[seen[first]]
            half_logdet = -float(np.log(diagonal).sum())
            stretches.append(Stretch(t, stop, P, K, W, half_logdet, diagonal.size))
            t, P, carried = stop, P_next, following
    return stretches, P


def _is_settled(moved: float, closed: Array) -> bool:
    """True when the steps that P_t would still make add up to less than the tolerance.

    `moved` is the largest entry of the last step, each in its own units.

    Steps shrink by the squared spectral radius of A - K C in the end. The ratio of the last two
    would not do as a rate: after a vague start it is tiny while slow directions are still to move.
    """
    if moved > 1e-8:
        return False
    rate = float(np.abs(np.linalg.eigvals(closed)).max(initial=0.0)) ** 2
    return moved <= max(CONVERGED * (1 - rate), EPS)
