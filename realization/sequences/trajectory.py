"""Linear systems along a trajectory: what is left of an input-varying system once u is fixed.

    x_{t+1} = A_t x_t + B_t v_t,   y_t = C_t x_t + D_t v_t,      t = 0 .. l-1

An input-varying system with a linear read-out becomes this when its coefficients are read off along
one input sequence; v is what its tokens write.  Everything about changes of basis is decided here.

    Phi(s, t) = A_{s-1} ... A_t                                    transition, Phi(t, t) = I
    R_t = [B_{t-1}, A_{t-1} B_{t-2}, .., Phi(t, t-N+1) B_{t-N}]      reachability, N past steps
    O_t = [C_t; C_{t+1} A_t; ..; C_{t+N-1} Phi(t+N-1, t)]            observability, N future steps
    h(t, s) = C_t Phi(t, s+1) B_s  (s < t),  h(t, t) = D_t           impulse response

Sizes: A (l, n, n), B (l, n, m), C (l, p, n), D (l, p, m), v (l, m), y (l, p).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from realization.sequences.systems import Array, Run, as_real, as_sequence
from realization.systems import as_real_array, positive_integer


@dataclass(frozen=True)
class LinearTrajectory:
    """A_t, B_t, C_t, D_t for t = 0 .. l-1, float64; see the module's docstring for the sizes."""

    A: Array
    B: Array
    C: Array
    D: Array

    def __post_init__(self) -> None:
        for name in "ABCD":
            value = as_real(getattr(self, name), name)
            if value.ndim != 3 or not value.shape[0]:
                raise ValueError(
                    f"{name} must have shape (l, rows, columns), l >= 1: {value.shape}"
                )
            if not np.isfinite(value).all():
                bad = np.argwhere(~np.isfinite(value))[0, 0]
                raise ValueError(f"{name} must be finite; it is not at t={bad}")
            object.__setattr__(self, name, value)
        l, n, m, p = len(self.A), self.n, self.m, self.p
        for name, shape in zip("ABCD", [(l, n, n), (l, n, m), (l, p, n), (l, p, m)]):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}; got {getattr(self, name).shape}")

    @property
    def n(self) -> int:
        """State size."""
        return self.A.shape[1]

    @property
    def m(self) -> int:
        """Number of inputs."""
        return self.B.shape[2]

    @property
    def p(self) -> int:
        """Number of outputs."""
        return self.C.shape[1]

    def __len__(self) -> int:
        return len(self.A)

    def run(self, v: ArrayLike, x0: ArrayLike | None = None) -> Run:
        """Outputs y (l, p) and states x (l + 1, n) for the inputs v (l, m).

        Raises
        ------
        ValueError
            If v is not (l, m) or x0 not (n,).
        """
        v = as_sequence(v, "v", self.m)
        if len(v) != len(self):
            raise ValueError(f"v must have {len(self)} rows, as the trajectory; got {len(v)}")
        x = np.zeros(self.n) if x0 is None else as_real_array("x0", x0, 1)
        if x.shape != (self.n,):
            raise ValueError(f"x0 must have shape ({self.n},); got {x.shape}")
        states, outputs = [x], []
        for A, B, C, D, v_t in zip(self.A, self.B, self.C, self.D, v):
            outputs.append(C @ x + D @ v_t)
            x = A @ x + B @ v_t
            states.append(x)
        return Run(np.array(outputs), np.array(states))

    def transition(self, s: int, t: int) -> Array:
        """Phi(s, t), 0 <= t <= s <= l, (n, n); ValueError for other times."""
        self._require_times(t, s)
        product = np.eye(self.n)
        for A in self.A[t:s]:
            product = A @ product
        return product

    def reachability(self, t: int, steps: int) -> Array:
        """R_t over ``steps`` past steps, (n, m steps); ValueError unless 1 <= steps <= t <= l."""
        self._require_times(t - positive_integer("steps", steps), t)
        return np.hstack([self.transition(t, s + 1) @ self.B[s] for s in backwards(t, steps)])

    def observability(self, t: int, steps: int) -> Array:
        """O_t over ``steps`` >= 1 future steps, (p steps, n); ValueError unless t + steps <= l."""
        self._require_times(t, t + positive_integer("steps", steps))
        return np.vstack([self.C[s] @ self.transition(s, t) for s in range(t, t + steps)])

    def impulse_response(self, t: int, s: int) -> Array:
        """h(t, s): what v_s contributes to y_t, (p, m); ValueError for times outside 0 .. l-1."""
        for time in (t, s):
            self._require_times(time, time + 1)
        if s > t:
            return np.zeros((self.p, self.m))
        return self.D[t] if s == t else self.C[t] @ self.transition(t, s + 1) @ self.B[s]

    def kernel(self) -> Array:
        """The whole input-output map from x_0 = 0, (l p, l m), block lower triangular."""
        times = range(len(self))
        return np.block([[self.impulse_response(t, s) for s in times] for t in times])

    def window(self, start: int, stop: int) -> LinearTrajectory:
        """The steps start .. stop - 1; ValueError unless 0 <= start < stop <= l."""
        self._require_times(start, stop)
        return LinearTrajectory(*(value[start:stop] for value in (self.A, self.B, self.C, self.D)))

    def change_basis(self, T: Array) -> LinearTrajectory:
        """The system in z_t = T_t x_t, t = 0 .. l.

        A_t -> T_{t+1} A_t T_t^{-1},   B_t -> T_{t+1} B_t,   C_t -> C_t T_t^{-1}

        Parameters
        ----------
        T : (l + 1, n, n)
            Invertible.
        """
        if T.shape != (len(self) + 1, self.n, self.n):
            raise ValueError(f"T must have shape {(len(self) + 1, self.n, self.n)}; got {T.shape}")
        right = T[:-1].swapaxes(1, 2)  # X T^{-1} solves X^T from T^T
        A = np.linalg.solve(right, (T[1:] @ self.A).swapaxes(1, 2)).swapaxes(1, 2)
        C = np.linalg.solve(right, self.C.swapaxes(1, 2)).swapaxes(1, 2)
        return LinearTrajectory(A, T[1:] @ self.B, C, self.D)

    def reversed(self) -> LinearTrajectory:
        """The same equations solved for x_t, run backwards in time.

            x_t = A_t^{-1} x_{t+1} - A_t^{-1} B_t v_t
            y_t = C_t A_t^{-1} x_{t+1} + (D_t - C_t A_t^{-1} B_t) v_t

        Its step r is the step l - 1 - r of the original, its state r the state l - r.

        Raises
        ------
        ValueError
            If A_t is singular (the past cannot be recovered): says at which t.
        """
        for t, A in enumerate(self.A):
            if np.linalg.cond(A) > 1e14:
                raise ValueError(f"time cannot be reversed: A_t is singular at t={t}")
        back = np.linalg.inv(self.A)
        steps = (back, -back @ self.B, self.C @ back, self.D - self.C @ back @ self.B)
        return LinearTrajectory(*(value[::-1] for value in steps))

    def _require_times(self, first: int, last: int) -> None:
        """ValueError unless 0 <= first <= last <= l: a negative time would count from the end."""
        if not 0 <= first <= last <= len(self):
            raise ValueError(
                f"times must lie in 0 .. {len(self)}, the earlier first; got {first} .. {last}"
            )


def backwards(t: int, steps: int) -> range:
    """t-1, t-2, .., t-steps."""
    return range(t - 1, t - 1 - steps, -1)


def time_invariant(
    A: ArrayLike, B: ArrayLike, C: ArrayLike, D: ArrayLike, l: int
) -> LinearTrajectory:
    """The same A (n, n), B (n, m), C (p, n), D (p, m) at each of l steps."""
    return LinearTrajectory(*(np.repeat(np.asarray(v)[None], l, axis=0) for v in (A, B, C, D)))
