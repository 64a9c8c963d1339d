"""Input-varying realizations: one form for attention, selective state spaces and their hybrids.

    x_{t+1} = A(u_t) x_t + b(u_t)        the state is updated, once a token
    y_t     = rho(u_t, x_t)              the read-out sees the token and what the state remembers

Symbols
    u_t   (d,)     token at time t, t = 0 .. l-1
    x_t   (n,)     state *before* token t: everything the past left behind
    A(u)  (n, n)   transition;  nilpotent: eidetic (finite span), diagonal and stable: fading
    b(u)  (n,)     what token u writes;  b(u) lies in the range of B(u)
    B(u)  (n, m)   directions in which a token can push the state:  x_{t+1} = A x_t + B(u_t) v_t
    rho   (p,)     read-out;  C(u, x) = d rho / d x  (p, n) is its slope at the point visited
    Phi(s, t)      A(u_{s-1}) ... A(u_t), the transition from time t to time s;  Phi(t, t) = I

Linear, time-invariant systems are the case where A, B, C do not depend on u.
Source: B'MOJO (arXiv 2407.06324), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from realization.systems import as_real_array

Array = NDArray[np.float64]


@runtime_checkable
class System(Protocol):
    """Anything that reads a token: a state size and a step."""

    @property
    def n(self) -> int:
        """State size."""

    def step(self, u: Array, x: Array) -> tuple[Array, Array]:
        """(y_t, x_{t+1}) from the token and the state."""


class Run(NamedTuple):
    """What a system did along one input sequence.

    Attributes
    ----------
    y : (l, p)
        Outputs.
    x : (l + 1, n)
        States; ``x[t]`` is the state before token t, ``x[l]`` is what is carried on.
    """

    y: Array
    x: Array


@dataclass(frozen=True)
class InputVaryingSystem:
    """x_{t+1} = A(u_t) x_t + b(u_t),  y_t = rho(u_t, x_t).

    Attributes
    ----------
    n : int
        State size.
    A, b, rho : callable
        ``A(u) -> (n, n)``, ``b(u) -> (n,)``, ``rho(u, x) -> (p,)``.
    B : callable
        ``B(u) -> (n, m)``, the directions a token can write in.
    C : callable
        ``C(u, x) -> (p, n)``, the slope of rho in x.
    """

    n: int
    A: Callable[[Array], Array]
    b: Callable[[Array], Array]
    rho: Callable[[Array, Array], Array]
    B: Callable[[Array], Array]
    C: Callable[[Array, Array], Array]

    def step(self, u: Array, x: Array) -> tuple[Array, Array]:
        """Read one token: returns ``(y_t, x_{t+1})``."""
        return self.rho(u, x), self.A(u) @ x + self.b(u)

    def run(self, u: ArrayLike, x0: ArrayLike | None = None) -> Run:
        """Read a sequence, token by token.

        Parameters
        ----------
        u : (l, d)
            Tokens, l >= 1.
        x0 : (n,), optional
            State before the first token; zeros by default.

        Raises
        ------
        ValueError
            If u is not a finite, non-empty (l, d) array or x0 has the wrong size.
        """
        return run_steps(self.step, self.n, u, x0)


@dataclass(frozen=True)
class Series:
    """Systems in series: stage k+1 reads what stage k puts out.

    Its state is the stages' states side by side, so the state size is their sum. A later stage's
    A then depends on the earlier stages' *states* through its input: a series of two input-varying
    systems is in general not of the form A(u_t) x_t + b(u_t) any more.

    Attributes
    ----------
    stages : tuple of systems
        Anything with ``n`` and ``step(u, x) -> (y, x_next)``.
    """

    stages: tuple[System, ...]

    @property
    def n(self) -> int:
        """State size: the sum over the stages."""
        return sum(stage.n for stage in self.stages)

    def split(self, x: Array) -> list[Array]:
        """Each stage's part of the state."""
        return np.split(x, np.cumsum([stage.n for stage in self.stages])[:-1])

    def step(self, u: Array, x: Array) -> tuple[Array, Array]:
        """Read one token: returns ``(y_t, x_{t+1})``."""
        after = []
        for stage, part in zip(self.stages, self.split(x)):
            u, part_after = stage.step(u, part)
            after.append(part_after)
        return u, np.concatenate(after)

    def run(self, u: ArrayLike, x0: ArrayLike | None = None) -> Run:
        """Read a sequence; see `InputVaryingSystem.run`."""
        return run_steps(self.step, self.n, u, x0)


@dataclass(frozen=True)
class Wrapped:
    """A system between two memoryless maps: y_t = after(u_t, system(before(u_t))).

    Attributes
    ----------
    system : system
    before : callable
        ``before(u)``: what the system reads (a normalisation, a part of the token).
    after : callable
        ``after(u, y)``: what goes on (``u + y`` in a residual stream).
    """

    system: System
    before: Callable[[Array], Array]
    after: Callable[[Array, Array], Array]

    @property
    def n(self) -> int:
        """State size of the system inside; memoryless maps add none."""
        return self.system.n

    def step(self, u: Array, x: Array) -> tuple[Array, Array]:
        """Read one token: returns ``(y_t, x_{t+1})``."""
        y, x = self.system.step(self.before(u), x)
        return self.after(u, y), x

    def run(self, u: ArrayLike, x0: ArrayLike | None = None) -> Run:
        """Read a sequence; see `InputVaryingSystem.run`."""
        return run_steps(self.step, self.n, u, x0)


def run_steps(step: Callable, n: int, u: ArrayLike, x0: ArrayLike | None) -> Run:
    """Iterate ``step`` over the rows of u, from x0; see `InputVaryingSystem.run`."""
    u = as_sequence(u)
    x = np.zeros(n) if x0 is None else as_real_array("x0", x0, 1)
    if x.shape != (n,):
        raise ValueError(f"x0 must have shape ({n},), the state size; got {x.shape}")
    states, outputs = [x], []
    for token in u:
        y, x = step(token, x)
        outputs.append(y)
        states.append(x)
    return Run(np.array(outputs), np.array(states))


def as_real(value: ArrayLike, name: str) -> Array:
    """As `as_real_array`, but for numbers whose caller says at which time they are not finite."""
    if np.iscomplexobj(value):
        raise ValueError(f"{name} must be real, got complex numbers")
    return np.asarray(value, dtype=float)


def as_sequence(u: ArrayLike, name: str = "u", width: int | None = None) -> Array:
    """``u`` as a finite float64 (l, d) array, l >= 1; ValueError otherwise."""
    u = as_real(u, name)
    if u.ndim != 2 or u.shape[0] == 0:
        raise ValueError(f"{name} must have shape (l, d) with l >= 1; got {u.shape}")
    if width is not None and u.shape[1] != width:
        raise ValueError(f"{name} must have {width} columns; got {u.shape[1]}")
    if not np.isfinite(u).all():
        raise ValueError(f"{name} must be finite; row {np.argwhere(~np.isfinite(u))[0, 0]} is not")
    return u


def state_size(system: System) -> int:
    """Numbers that must be kept to go on: n."""
    return system.n


def transition(system: InputVaryingSystem, u: ArrayLike, start: int, stop: int) -> Array:
    """Phi(stop, start) = A(u_{stop-1}) ... A(u_start), (n, n), along the tokens u (l, d)."""
    u = as_sequence(u)
    if not 0 <= start <= stop <= len(u):
        raise ValueError(f"need 0 <= start <= stop <= {len(u)}; got start={start}, stop={stop}")
    product = np.eye(system.n)
    for token in u[start:stop]:
        product = system.A(token) @ product
    return product


def nilpotency_index(system: InputVaryingSystem, u: ArrayLike, tol: float = 0.0) -> int | None:
    """Smallest k for which *every* product of k consecutive transitions along u is zero.

    After k tokens nothing of the initial state is left: the system is deadbeat in k steps.

    Parameters
    ----------
    u : (l, d)
        Tokens.
    tol : float
        Entries up to this size count as zero.

    Returns
    -------
    int or None
        None when no k <= min(n, l) does it; a nilpotent system of n states needs k <= n when
        A is constant, and a product along one short sequence proves nothing about longer ones.
    """
    u = as_sequence(u)
    products = [np.eye(system.n) for _ in u]
    for k in range(min(system.n, len(u)) + 1):
        if all(np.abs(p).max(initial=0.0) <= tol for p in products):
            return k
        # products[t] = Phi(t + k, t); drop those that would run past the end
        products = [system.A(u[t + k]) @ p for t, p in enumerate(products) if t + k < len(u)]
        if not products:
            break
    return None


def reachability_matrix(system: InputVaryingSystem, u: ArrayLike, t: int, steps: int) -> Array:
    """[B_{t-1}, A_{t-1} B_{t-2}, ..., Phi(t, t-steps+1) B_{t-steps}], (n, m * steps).

    Its range is where the tokens at t-steps .. t-1 can have put the state x_t.
    """
    u = as_sequence(u)
    if not 1 <= steps <= t <= len(u):
        raise ValueError(f"need 1 <= steps <= t <= {len(u)}; got steps={steps}, t={t}")
    columns, product = [], np.eye(system.n)
    for s in range(t - 1, t - steps - 1, -1):
        columns.append(product @ system.B(u[s]))
        product = product @ system.A(u[s])
    return np.hstack(columns)


def observability_matrix(
    system: InputVaryingSystem, u: ArrayLike, t: int, steps: int, x: ArrayLike | None = None
) -> Array:
    """[C_t; C_{t+1} A_t; ...; C_{t+steps-1} Phi(t+steps-1, t)], (p * steps, n).

    Its null space is what a small change of x_t cannot show in the outputs t .. t+steps-1.

    Parameters
    ----------
    x : (l + 1, n), optional
        States visited (``run(u).x``), needed where rho is not linear; from zeros by default.
    """
    u = as_sequence(u)
    if not (steps >= 1 and t >= 0 and t + steps <= len(u)):
        raise ValueError(f"need steps >= 1 and 0 <= t <= {len(u)} - steps; got {steps=}, {t=}")
    x = system.run(u).x if x is None else as_real_array("x", x, 2)
    rows, product = [], np.eye(system.n)
    for s in range(t, t + steps):
        rows.append(system.C(u[s], x[s]) @ product)
        product = system.A(u[s]) @ product
    return np.vstack(rows)


def reachable_rank(
    system: InputVaryingSystem, u: ArrayLike, t: int, steps: int, tol: float = 1e-10
) -> int:
    """Dimension of what the last ``steps`` tokens can reach at time t (relative tolerance)."""
    return relative_rank(reachability_matrix(system, u, t, steps), tol)


def observable_rank(
    system: InputVaryingSystem,
    u: ArrayLike,
    t: int,
    steps: int,
    x: ArrayLike | None = None,
    tol: float = 1e-10,
) -> int:
    """Dimension of the state at t that the next ``steps`` outputs show, to first order."""
    return relative_rank(observability_matrix(system, u, t, steps, x), tol)


def relative_rank(matrix: Array, tol: float) -> int:
    """Number of singular values above ``tol`` times the largest."""
    sigma = np.linalg.svd(matrix, compute_uv=False)
    return int((sigma > tol * sigma.max(initial=0.0)).sum())
