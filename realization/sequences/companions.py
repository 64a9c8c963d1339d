"""Two more companions: one exact and causal but twice as large, one small but not the same system.

Window form. An observable system's output is a function of its own recent past: eliminating the
state between C_t x_t and the N outputs before it,

    y_t = sum_{i=1..N} phi_i(t) y_{t-i} + theta_i(t) v_{t-i}  + D_t v_t
    phi(t) O_{t-N} = C_t Phi(t, t-N),     theta_i(t) = h(t, t-i) - sum_j phi_j(t) h(t-j, t-i)

so the window of pairs (v_{t-N}, y_{t-N}) .. (v_{t-1}, y_{t-1}) is a state. Its A is a block
companion, identities above the diagonal and one full block row, and tokens enter in the last
block only: the shape the paper draws for B'MOJO-F, now exact and causal for input-varying
systems. The price is n + N m numbers instead of n, and a last row that is a function of u_{t-N}
.. u_t rather than of u_t alone.

Frozen form. At each t, the companion of the *frozen* pair (A_t, B_t), as if it had always been
and would always be there, read out so that each frozen transfer function is right:

    [[0, I], [a(u_t)]]  with the characteristic polynomial of A_t,      c~_t = C_t T(u_t)^{-1}

Exact for constant coefficients. For varying ones the basis T(u_t) moves at each step and nothing
moves the state along: the state is handed over in the wrong coordinates, and the map is another
one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from realization.sequences.attention import up_shift
from realization.sequences.canonical import check_regular, controller_form, order
from realization.sequences.selective import SelectiveWeights, channel_trajectory
from realization.sequences.systems import Array, InputVaryingSystem, Run, as_sequence, run_steps
from realization.sequences.trajectory import LinearTrajectory, time_invariant


@dataclass(frozen=True)
class WindowForm:
    """The window of the last N inputs and outputs as state.

    Attributes
    ----------
    start : int
        Time of the first step covered, N.
    blocks : int
        N.
    system : LinearTrajectory
        State size N (m + p), oldest pair first; steps start .. l - 1.
    """

    start: int
    blocks: int
    system: LinearTrajectory

    def state(self, v: ArrayLike, y: ArrayLike) -> Array:
        """The state that remembers the last N rows of v (k, m) and y (k, p), k >= N."""
        v, y = as_sequence(v, "v", self.system.m), as_sequence(y, "y", self.system.p)
        if min(len(v), len(y)) < self.blocks:
            raise ValueError(f"{self.blocks} past steps needed; got {len(v)} of v, {len(y)} of y")
        return np.hstack([v[-self.blocks :], y[-self.blocks :]]).reshape(-1)


def window_form(
    system: LinearTrajectory, blocks: int | None = None, tol: float = 1e-13
) -> WindowForm:
    """The exact causal block companion of an observable trajectory.

    Parameters
    ----------
    system : LinearTrajectory
        Observable in N steps all along; need not be reachable, nor A_t invertible.
    blocks : int, optional
        N, by default the least that can do: ceil(n / p).
    tol : float
        As in `canonical.controller_form`.

    Raises
    ------
    ValueError
        If observability in N steps is lost, always so if p N < n: says at which time. If l <= N.
    """
    N = -(-system.n // system.p) if blocks is None else blocks
    if not 1 <= N < len(system):
        raise ValueError(f"blocks must be between 1 and {len(system) - 1}; got {N}")
    steps = range(N, len(system))
    rows = np.array([arma_row(system, t, N, tol) for t in steps])  # (k, p, N (m + p))
    m, p, k = system.m, system.p, len(rows)
    A = np.repeat(up_shift(N, np.eye(m + p))[None], k, axis=0)
    A[:, -p:] = rows
    B = np.zeros((k, N * (m + p), m))
    B[:, -(m + p) : -p] = np.eye(m)
    B[:, -p:] = system.D[N:]
    return WindowForm(N, N, LinearTrajectory(A, B, rows, system.D[N:]))


def arma_row(system: LinearTrajectory, t: int, N: int, tol: float = 1e-13) -> Array:
    """[theta_N, phi_N, .., theta_1, phi_1] at t, (p, N (m + p)); a function of u_{t-N} .. u_t."""
    m, p = system.m, system.p
    O = system.observability(t - N, N)
    what = f"not observable in {N} steps at t={t - N}: O_t, from steps {t - N} to {t - 1},"
    check_regular(O, tol, what)
    phi = system.C[t] @ system.transition(t, t - N) @ np.linalg.pinv(O)  # (p, N p), oldest first
    past = range(t - N, t)
    h = np.hstack([system.impulse_response(t, s) for s in past])
    H = np.block([[system.impulse_response(r, s) for s in past] for r in past])
    theta = h - phi @ H
    pairs = [theta.reshape(p, N, m), phi.reshape(p, N, p)]
    return np.concatenate(pairs, axis=2).reshape(p, N * (m + p))


@dataclass(frozen=True)
class WindowedScan:
    """The selective scan with the window of its last N tokens and outputs as state, exactly.

    The window form, computed as the text is read: a block up-shift of N blocks (u, y, 1) whose last
    block row, channel by channel, is that of `window_form`. Those coefficients are functions of
    u_{t-N} .. u_t, that is of the token and the state. Until the window is full (third entry 0) no
    y is needed: the scan starts from zero, and y_t = sum_s h(t, s) u_s over what has been read.

    Attributes
    ----------
    weights : SelectiveWeights
    blocks : int
        N >= n, the scan's states a channel. A longer window is better conditioned.
    """

    weights: SelectiveWeights
    blocks: int

    def __post_init__(self) -> None:
        if self.blocks < self.weights.A.shape[1]:
            raise ValueError(
                f"blocks must be at least {self.weights.A.shape[1]}, the states a channel; "
                f"got {self.blocks}"
            )

    @property
    def n(self) -> int:
        """State size, N (2 e + 1)."""
        return self.blocks * (2 * len(self.weights.A) + 1)

    def step(self, u: Array, x: Array) -> tuple[Array, Array]:
        """Read one token: returns ``(y_t, x_{t+1})``.

        Raises
        ------
        ValueError
            If some channel is not observable along the window.
        """
        window = x.reshape(self.blocks, -1)
        past = window[window[:, -1] > 0.5, :-1]
        tokens = np.vstack([past[:, : len(u)], u])
        y = np.array([self._channel(tokens, past, channel) for channel in range(len(u))])
        return y, np.vstack([window[1:], np.concatenate([u, y, [1.0]])]).reshape(-1)

    def run(self, u: ArrayLike, x0: ArrayLike | None = None) -> Run:
        """Read a sequence; see `systems.InputVaryingSystem.run`."""
        return run_steps(self.step, self.n, u, x0)

    def _channel(self, tokens: Array, past: Array, channel: int) -> float:
        system = channel_trajectory(self.weights, tokens, channel)
        pairs, t = past[:, [channel, channel + tokens.shape[1]]], len(past)
        if t < self.blocks:
            known = sum(system.impulse_response(t, s)[0, 0] * pairs[s, 0] for s in range(t))
        else:
            known = arma_row(system, t, t)[0] @ pairs.reshape(-1)
        return float(known + system.D[t, 0, 0] * tokens[t, channel])


def frozen_form(system: LinearTrajectory) -> LinearTrajectory:
    """At each t the companion of the frozen (A_t, B_t, C_t): exact if constant, else another map.

    Raises
    ------
    ValueError
        If some frozen pair (A_t, B_t) is not reachable, or n is no multiple of m.
    """
    N = order(system.n, system.m, "m")
    frozen = []
    for t in range(len(system)):
        now = (system.A[t], system.B[t], system.C[t], system.D[t])
        try:
            frozen.append(controller_form(time_invariant(*now, l=2 * N)).system.window(0, 1))
        except ValueError as error:
            raise ValueError(f"the pair frozen at t={t} is not reachable") from error
    return LinearTrajectory(
        *(np.concatenate([getattr(f, name) for f in frozen]) for name in "ABCD")
    )


def block_companion(
    width: int,
    blocks: int,
    last_row: Callable[[Array], Array],
    write: Callable[[Array], Array],
    rho: Callable[[Array, Array], Array],
    C: Callable[[Array, Array], Array],
) -> InputVaryingSystem:
    """The paper's B'MOJO-F form, as a general input-varying system.

    A(u) has identities (width, width) above the diagonal and ``last_row(u)`` (width, blocks *
    width)
    = [a_1(u) .. a_N(u)] below; tokens enter the last block through ``write(u)`` (width, m).
    last_row = 0 is windowed attention's register; the characteristic polynomial of a constant
    diagonal is that diagonal's fading memory.

    Parameters
    ----------
    last_row, write : callable
        Functions of the token; b(u) = [0; the sum of the columns of write(u)].
    rho, C : callable
        Read-out and its slope, as in `InputVaryingSystem`.

    Raises
    ------
    ValueError
        If width or blocks is below 1.
    """
    if min(width, blocks) < 1:
        raise ValueError(f"width and blocks must be at least 1; got {width=}, {blocks=}")
    n = width * blocks
    shift = up_shift(blocks, np.eye(width))

    def A(u: Array) -> Array:
        return np.vstack([shift[:-width], last_row(u)])

    def B(u: Array) -> Array:
        columns = write(u)
        return np.vstack([np.zeros((n - width, columns.shape[1])), columns])

    return InputVaryingSystem(n=n, A=A, b=lambda u: B(u).sum(axis=1), rho=rho, B=B, C=C)
