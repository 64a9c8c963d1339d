"""Canonical forms of input-varying systems: exact, and which of them are causal.

Controller form (the paper's: identities above the diagonal, a full last row, input last)

    z_t = T_t x_t,   T_{t+1} A_t T_t^{-1} = [[0, I], [a_1(t) .. a_N(t)]],   T_{t+1} B_t = [0; .. I]

Theorem 1 (existence, uniqueness). Let n = N m. T_t with these two properties exists if and only
if every R_t is invertible; then there is exactly one:

    q_t R_t = [0 .. 0 I],     T_t = [q_t; q_{t+1} A_t; ..; q_{t+N-1} Phi(t+N-1, t)].

Proof. Block row i < N of "T_{t+1} A_t = companion T_t" says that row i of T_{t+1}, times A_t, is
row i + 1 of T_t; so the first block row q decides all: row i of T_t is q_{t+i-1} Phi(t+i-1, t). The
rows of T_{t+1} B_t then say q_{t+i} Phi(t+i, t+1) B_t = 0 for i < N and I for i = N. Collected at
one time s = t + i these are the N block equations q_s R_s = [0 .. 0 I]. They make T_t R_t block
anti-triangular with identities on the anti-diagonal, so T_t is invertible exactly if R_t is. []

zeta_t = q_t x_t, the first block of z, is the flat output:

    zeta_{t+N} = sum_i a_i(t) zeta_{t+i-1} + v_t.

Theorem 2 (what the last row depends on). Let alpha(t) be the last column of the reachability form,

    R_{t+1} alpha(t) = Phi(t+1, t-N+1) B_{t-N}.      Then    a_i(t) = alpha_i(t + i - 1).

alpha(t) is a function of u_{t-N} .. u_t. So a_i(t) is a function of the N + 1 tokens
u_{t-N+i-1} .. u_{t+i-1}, the last i - 1 of them in the future; the row as a whole of
u_{t-N} .. u_{t+N-1}. At order 4: u_{t-4} .. u_{t+3}. The form is causal for N = 1; for N > 1 in
general it is not (A_t = g_t F with constant B is an exception).

Proof. Let g(s, r) be the response of zeta_s to v_r: 0 for s < r + N, I for s = r + N. The equation
of the flat output is D g = I with D[t, t+N] = I, D[t, t+i-1] = -a_i(t). Up to a shift by N both D
and g are lower triangular with identities on the diagonal: the inverse is two-sided, g D = I:

    g(s, r-N) = sum_i g(s, r-i+1) a_i(r-i+1)                   for all s > r.

On the other hand q_s Phi(s, r+1), s > r, applied to the definition of alpha(r) gives

    g(s, r-N) = sum_i g(s, r-i+1) alpha_i(r).

For s = r+1 .. r+N the coefficients g(s, r-i+1) are the matrix T_{r+1} R_{r+1}, which is invertible;
hence a_i(r-i+1) = alpha_i(r). []

No scaling helps. T_{t+1} B_t = [0; .. beta_t] instead of [0; .. I] gives the rows
beta_t a_i(t) beta_{t+i-1-N}^{-1}: if beta_t is causal, the future in a_N(t), N > 1, stays.

Companion shape alone says nothing. Without the demand on B, any invertible A_t goes to any constant
invertible companion F by T_t = F^t T_0 Phi(t, 0)^{-1}, causally; T_{t+1} B_t then depends on the
whole past.

Which forms are causal: `FORMS` lists eight with the tokens that each depends on; the formulas are
in the functions, and `sensitivity` measures it. Only two are causal for input-varying systems:
reachability, and the time-reversed twin of observability. `companions.window_form` is a third
causal answer, in the paper's shape, with twice the state.

Sources: paper, appendix C (constant coefficients). Constant case: Kailath, Linear Systems, section
2.3. Time-varying systems: Silverman (1966), "Transformation of time-variable systems to canonical
(phase-variable) form".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from realization.sequences.systems import Array
from realization.sequences.trajectory import LinearTrajectory


@dataclass(frozen=True)
class CanonicalForm:
    """A trajectory in other coordinates, z_t = T_t x_t.

    Attributes
    ----------
    start : int
        Time of the first step covered.
    T : (k + 1, n, n)
        T_t for t = start .. start + k.
    system : LinearTrajectory
        T_{t+1} A_t T_t^{-1}, T_{t+1} B_t, C_t T_t^{-1}, D_t for t = start .. start + k - 1.
    """

    start: int
    T: Array
    system: LinearTrajectory

    @property
    def stop(self) -> int:
        """One past the last step covered."""
        return self.start + len(self.system)

    def run(self, v: ArrayLike, x: ArrayLike) -> Array:
        """Outputs at start .. stop - 1, from x_start in the old basis and the inputs v there."""
        return self.system.run(v, self.T[0] @ np.asarray(x, dtype=float)).y


Form = Callable[[LinearTrajectory], CanonicalForm]


def controller_form(system: LinearTrajectory, tol: float = 1e-13) -> CanonicalForm:
    """Row companion with the input in the last block: the paper's form, exactly (theorem 1).

    Covers the steps N .. l - N of the trajectory, N = n / m: T_t needs N steps before and N - 1
    after.

    Parameters
    ----------
    system : LinearTrajectory
        n divisible by m, l >= 2 N.
    tol : float
        R_t counts as singular when its smallest singular value is at most tol times its largest.

    Raises
    ------
    ValueError
        If reachability is lost: says at which time.
    """
    N = order(system.n, system.m, "m")
    start, stop = covered(system, N, len(system) - N + 1)
    q = np.array([flat_rows(system, t, N, tol) for t in range(start, len(system) + 1)])
    rows = [q]  # rows[i][t - start] = q_{t+i} Phi(t+i, t) = (row i of t + 1) A_t
    for _ in range(N - 1):
        last = rows[-1]
        rows.append(last[1:] @ system.A[start : start + len(last) - 1])
    T = np.concatenate([row[: stop - start + 1] for row in rows], axis=1)
    return transformed(system, start, T)


def reachability_form(system: LinearTrajectory, tol: float = 1e-13) -> CanonicalForm:
    """Column companion, T_t = R_t^{-1}: last column alpha(t), B = e_1. Causal.

    z_t holds the last N inputs, newest first, plus what was folded back: the input that
    falls off the end of the window re-enters as the combination alpha(t) of those still in it.
    C_t R_t lists the impulse response h(t, t-1) .. h(t, t-N).

    Raises
    ------
    ValueError
        If reachability is lost: says at which time.
    """
    N = order(system.n, system.m, "m")
    start, stop = covered(system, N, len(system))
    R = np.array([regular_reachability(system, t, N, tol) for t in range(start, stop + 1)])
    return transformed(system, start, np.linalg.inv(R))


def observability_form(system: LinearTrajectory, tol: float = 1e-13) -> CanonicalForm:
    """Row companion, T_t = O_t: z_t lists the next N outputs for zero input; C = e_1. Anti-causal.

    Raises
    ------
    ValueError
        If observability is lost: says at which time.
    """
    N = order(system.n, system.p, "p")
    start, stop = covered(system, 0, len(system) - N)
    T = np.array([regular_observability(system, t, N, tol) for t in range(start, stop + 1)])
    return transformed(system, start, T)


def observer_form(system: LinearTrajectory, tol: float = 1e-13) -> CanonicalForm:
    """Column companion with C = e_N: dual of the controller form, and as little causal.

    T_t^{-1} = [s_t, A_{t-1} s_{t-1}, .., Phi(t, t-N+1) s_{t-N+1}] with O_t s_t = [0; .. I].

    Raises
    ------
    ValueError
        If observability is lost: says at which time.
    """
    N, p = order(system.n, system.p, "p"), system.p
    start, stop = covered(system, N - 1, len(system) - N)
    unit = np.eye(system.n)[:, -p:]
    s = {
        t: np.linalg.solve(regular_observability(system, t, N, tol), unit) for t in range(stop + 1)
    }
    S = [
        np.hstack([system.transition(t, t - k) @ s[t - k] for k in range(N)])
        for t in range(start, stop + 1)
    ]
    return transformed(system, start, np.linalg.inv(np.array(S)))


def time_reversed(form: Form) -> Form:
    """The twin of a form: that form of the system run backwards, seen in forward time.

    Needs every A_t invertible (always so for exp(Delta A)). Time reversal turns reach into control
    and future outputs into past ones: the twin of `observability_form` writes x_t through the N
    outputs before t, and is causal. Shapes are those of inverse companions.
    """

    def twin(system: LinearTrajectory) -> CanonicalForm:
        try:
            back = form(system.reversed())
        except ValueError as error:
            raise ValueError(f"run backwards, times counted from the end: {error}") from error
        start = len(system) - back.stop
        T = back.T[::-1]
        return transformed(system, start, T)

    twin.__name__ = f"time_reversed({form.__name__})"
    return twin


# Steps u_{t+first} .. u_{t+last} on which (A~_t, B~_t, C~_t) depend, in units of (N, 1): first =
# f0 N + f1, last = g0 N + g1, for systems in which A_t, B_t, C_t, D_t are functions of u_t alone.
FORMS: dict[str, tuple[Form, tuple[int, int], tuple[int, int]]] = {
    "controller": (controller_form, (-1, 0), (1, -1)),
    "reachability": (reachability_form, (-1, 0), (0, 0)),
    "observability": (observability_form, (0, 0), (1, 0)),
    "observer": (observer_form, (-1, 1), (1, 0)),
    "reversed controller": (time_reversed(controller_form), (-1, 1), (1, 0)),
    "reversed reachability": (time_reversed(reachability_form), (0, 0), (1, 0)),
    "reversed observability": (time_reversed(observability_form), (-1, 0), (0, 0)),
    "reversed observer": (time_reversed(observer_form), (-1, 0), (1, -1)),
}


def dependence(name: str, order: int) -> tuple[int, int]:
    """(first, last): the form's coefficients at t are functions of u_{t+first} .. u_{t+last}.

    Parameters
    ----------
    name : str
        A key of `FORMS`.
    order : int
        N, the number of blocks of the companion.
    """
    if name not in FORMS:
        raise ValueError(f"name must be one of {sorted(FORMS)}; got {name!r}")
    _, (f0, f1), (g0, g1) = FORMS[name]
    return f0 * order + f1, g0 * order + g1


def is_causal(name: str, order: int) -> bool:
    """Whether the form at t needs no token after t."""
    return dependence(name, order)[1] <= 0


def sensitivity(
    coefficients: Callable[[Array], Array], u: ArrayLike, step: float = 1e-4, seed: int = 0
) -> Array:
    """How much each token moves each time's coefficients: a picture of who depends on whom.

    Parameters
    ----------
    coefficients : callable
        ``coefficients(u) -> (k, ...)``: what is asked about, one entry a time.
    u : (l, d)
        Tokens.
    step : float
        Size of the change made to one token, in a random direction.
    seed : int
        Of that direction.

    Returns
    -------
    (k, l)
        Largest absolute change of entry t for a change of token s, divided by ``step``.
    """
    u = np.asarray(u, dtype=float)
    base = coefficients(u)
    direction = np.random.default_rng(seed).normal(size=u.shape)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    change = np.zeros((len(base), len(u)))
    for s in range(len(u)):
        moved = u.copy()
        moved[s] += step * direction[s]
        difference = np.abs(coefficients(moved) - base).reshape(len(base), -1)
        change[:, s] = difference.max(axis=1) / step
    return change


# -- the pieces ---------------------------------------------------------------------------------


def order(n: int, width: int, name: str) -> int:
    """N = n / width, the number of companion blocks; ValueError when it is not whole."""
    if n < 1 or n % width:
        raise ValueError(f"the state size must be a multiple of {name}; got n={n}, {name}={width}")
    return n // width


def covered(system: LinearTrajectory, start: int, stop: int) -> tuple[int, int]:
    """(start, stop), the steps a form covers; ValueError when there are none."""
    if stop <= start:
        need = len(system) + start - stop + 1
        raise ValueError(f"the trajectory is too short: {len(system)} steps, {need} needed")
    return start, stop


def regular_reachability(system: LinearTrajectory, t: int, N: int, tol: float) -> Array:
    """R_t over N steps, after checking that it is invertible."""
    R = system.reachability(t, N)
    check_regular(
        R, tol, f"not reachable in {N} steps at t={t}: R_t, from steps {t - N} to {t - 1},"
    )
    return R


def regular_observability(system: LinearTrajectory, t: int, N: int, tol: float) -> Array:
    """O_t over N steps, after checking that it is invertible."""
    O = system.observability(t, N)
    check_regular(
        O, tol, f"not observable in {N} steps at t={t}: O_t, from steps {t} to {t + N - 1},"
    )
    return O


def check_regular(matrix: Array, tol: float, what: str) -> None:
    """ValueError when the columns are dependent: a singular value of at most tol times the largest.

    A matrix with fewer rows than columns has as many singular values missing: they are zeros.
    """
    sigma = np.linalg.svd(matrix, compute_uv=False)
    rank, n = int((sigma > tol * sigma.max(initial=0.0)).sum()), matrix.shape[1]
    if rank < n:
        raise ValueError(f"the trajectory is {what} has rank {rank} of {n} (tol={tol:g})")


def flat_rows(system: LinearTrajectory, t: int, N: int, tol: float) -> Array:
    """q_t, (m, n): the block row with q_t R_t = [0 .. 0 I]."""
    R = regular_reachability(system, t, N, tol)
    return np.linalg.solve(R.T, np.eye(system.n)[:, -system.m :]).T


def companion_column(system: LinearTrajectory, t: int, tol: float = 1e-13) -> Array:
    """alpha(t), (n, m), with R_{t+1} alpha(t) = Phi(t+1, t-N+1) B_{t-N}: of u_{t-N} .. u_t.

    Raises
    ------
    ValueError
        If reachability is lost, or t is not in N .. l-1.
    """
    N = order(system.n, system.m, "m")
    if not N <= t < len(system):
        raise ValueError(f"t must be in {N} .. {len(system) - 1}; got {t}")
    R = regular_reachability(system, t + 1, N, tol)
    return np.linalg.solve(R, system.transition(t + 1, t - N + 1) @ system.B[t - N])


def transformed(system: LinearTrajectory, start: int, T: Array) -> CanonicalForm:
    """The steps start .. start + len(T) - 2 of the system, in the coordinates T."""
    return CanonicalForm(start, T, system.window(start, start + len(T) - 1).change_basis(T))
