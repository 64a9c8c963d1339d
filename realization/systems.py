"""Linear systems in discrete time, given by a state.

    x_{t+1} = A x_t + B u_t                                                    (state equation)
    y_t     = C x_t + D u_t                                                    (output equation)

The state x_t is what the past must hand to the future: given x_t, the outputs from t on depend on
nothing before t except through it. The same input-output map has many states; `transform` moves
between them, x' = T x, and leaves the two invariants alone:

    M_0 = D,  M_k = C A^{k-1} B       (Markov parameters, the response to an impulse)
    G(z)  = D + C (z I - A)^{-1} B = sum_k M_k z^{-k}              (transfer function)

Glossary
    n, m, p   orders of state, input, output       T      length of a record, or a change of basis
    A (n, n)  state transition                     u      inputs,  (T, m)
    B (n, m)  input to state                       x      states,  (T + 1, n)
    C (p, n)  state to output                      y      outputs, (T, p)
    D (p, m)  input to output, same step           M      Markov parameters, (k, p, m)

Source: Kailath, Linear Systems (1980), chapters 2 and 6; Antsaklis and Michel, Linear Systems
(2006), chapter 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def as_real_array(name: str, value: ArrayLike, ndim: int) -> Array:
    """Copy `value` into a float64 array after checking its dimension and that it is finite.

    Parameters
    ----------
    name : str
        What the caller calls the argument; it stands in the error message.
    value : array_like
        Real numbers.
    ndim : int
        The number of dimensions that the caller needs.

    Returns
    -------
    ndarray of float64

    Raises
    ------
    ValueError
        If `value` is not numeric, is complex, has another number of dimensions, or is not finite.
    """
    try:
        array = np.asarray(value)
        if np.iscomplexobj(array):
            raise ValueError("complex")
        array = np.array(array, dtype=np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of real numbers, got {value!r:.80}") from error
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return array


@dataclass(frozen=True, eq=False, repr=False)
class StateSpace:
    """The system x_{t+1} = A x_t + B u_t, y_t = C x_t + D u_t.

    Parameters
    ----------
    A : array_like, shape (n, n)
        State transition; n may be 0, a system without memory.
    B : array_like, shape (n, m)
        Input matrix, m >= 1.
    C : array_like, shape (p, n)
        Output matrix, p >= 1.
    D : array_like, shape (p, m), optional
        Feedthrough; zero when left out.

    Raises
    ------
    ValueError
        If a matrix is not real, finite and two-dimensional, or the shapes do not fit.

    Notes
    -----
    The arrays are float64 copies and read-only: a system is a value, and two systems are compared
    with `allclose`, because equality of floating-point matrices is rarely what is meant.

    Examples
    --------
    >>> accumulator = StateSpace([[1.0]], [[1.0]], [[1.0]], [[0.0]])
    >>> accumulator.markov(4).ravel()
    array([0., 1., 1., 1.])
    """

    A: ArrayLike
    B: ArrayLike
    C: ArrayLike
    D: ArrayLike | None = None

    def __post_init__(self) -> None:
        A, B, C = (as_real_array(name, getattr(self, name), 2) for name in "ABC")
        n, m, p = A.shape[0], B.shape[1], C.shape[0]
        D = np.zeros((p, m)) if self.D is None else as_real_array("D", self.D, 2)
        if m < 1 or p < 1:
            raise ValueError(f"B and C must have at least one input and output, got m={m}, p={p}")
        for name, array, shape in zip("ABCD", (A, B, C, D), ((n, n), (n, m), (p, n), (p, m))):
            if array.shape != shape:
                raise ValueError(
                    f"{name} must have shape {shape}, given n={n} rows of A, m={m} columns of B "
                    f"and p={p} rows of C; got {array.shape}"
                )
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __repr__(self) -> str:
        return (
            f"StateSpace(n={self.n}, m={self.m}, p={self.p}, max|pole|={self.spectral_radius:.4g})"
        )

    @property
    def n(self) -> int:
        """Order: the dimension of the state."""
        return self.A.shape[0]

    @property
    def m(self) -> int:
        """Number of inputs."""
        return self.B.shape[1]

    @property
    def p(self) -> int:
        """Number of outputs."""
        return self.C.shape[0]

    @property
    def poles(self) -> NDArray[np.complex128]:
        """Eigenvalues of A, shape (n,), largest modulus first."""
        poles = np.linalg.eigvals(self.A).astype(np.complex128)
        return poles[np.lexsort((-poles.imag, -poles.real, -np.abs(poles)))]

    @property
    def spectral_radius(self) -> float:
        """Largest modulus of a pole; 0 for a system without state."""
        return float(np.abs(self.poles).max(initial=0.0))

    @property
    def is_stable(self) -> bool:
        """True when every pole lies strictly inside the unit circle."""
        return self.spectral_radius < 1.0

    def markov(self, k: int) -> Array:
        """First k Markov parameters M_0 = D, M_i = C A^{i-1} B.

        Parameters
        ----------
        k : int
            How many, at least 1.

        Returns
        -------
        ndarray, shape (k, p, m)

        Raises
        ------
        ValueError
            If k is not a positive integer.
        """
        k = positive_integer("k", k)
        H = np.empty((k, self.p, self.m))
        H[0] = self.D
        if k > 1:
            R = reachability_matrix(self.A, self.B, k - 1)
            H[1:] = (self.C @ R).reshape(self.p, k - 1, self.m).transpose(1, 0, 2)
        return H

    def states(self, u: ArrayLike, x0: ArrayLike | None = None) -> Array:
        """States x_0 .. x_T that the inputs drive the system through.

        Parameters
        ----------
        u : array_like, shape (T, m)
            Inputs, T >= 1.
        x0 : array_like, shape (n,), optional
            State before the first input; zero when left out.

        Returns
        -------
        ndarray, shape (T + 1, n)

        Raises
        ------
        ValueError
            If the shapes do not fit, T is 0, or a value is not finite.
        """
        u = self._inputs(u)
        return linear_recursion(self.A, u @ self.B.T, self._initial_state(x0))

    def simulate(self, u: ArrayLike, x0: ArrayLike | None = None) -> Array:
        """Outputs y_0 .. y_{T-1}, by the exact recursion.

        Parameters
        ----------
        u : array_like, shape (T, m)
            Inputs, T >= 1.
        x0 : array_like, shape (n,), optional
            State before the first input; zero when left out.

        Returns
        -------
        ndarray, shape (T, p)

        Raises
        ------
        ValueError
            If the shapes do not fit, T is 0, or a value is not finite.
        """
        u = self._inputs(u)
        x = linear_recursion(self.A, u @ self.B.T, self._initial_state(x0))
        return x[:-1] @ self.C.T + u @ self.D.T

    def transform(self, T: ArrayLike) -> StateSpace:
        """The same input-output map in the coordinates x' = T x: (T A T^-1, T B, C T^-1, D).

        Parameters
        ----------
        T : array_like, shape (n, n)
            Invertible change of basis.

        Returns
        -------
        StateSpace

        Raises
        ------
        ValueError
            If T has another shape, is not finite, or is singular.
        """
        T = as_real_array("T", T, 2)
        if T.shape != (self.n, self.n):
            raise ValueError(f"T must have shape {(self.n, self.n)}, got {T.shape}")
        try:
            # X T^-1 is computed as a solve with T': one rounding fewer than with an inverse.
            AC = np.linalg.solve(T.T, np.vstack([T @ self.A, self.C]).T).T
        except np.linalg.LinAlgError as error:
            raise ValueError("T must be invertible, got a singular matrix") from error
        return StateSpace(AC[: self.n], T @ self.B, AC[self.n :], self.D)

    def dual(self) -> StateSpace:
        """The transposed system (A^T, C^T, B^T, D^T): inputs and outputs change places.

        Returns
        -------
        StateSpace
            With Markov parameters M_k^T.
        """
        return StateSpace(self.A.T, self.C.T, self.B.T, self.D.T)

    def transfer_function(self, z: ArrayLike) -> NDArray[np.complex128]:
        """G(z) = D + C (z I - A)^{-1} B at each point z.

        Parameters
        ----------
        z : array_like of complex, any shape
            Points of the complex plane; exp(1j * omega) gives the frequency response, with omega
            in radians a step.

        Returns
        -------
        ndarray of complex, shape z.shape + (p, m)

        Raises
        ------
        ValueError
            If a point is a pole, or not finite.
        """
        z = np.asarray(z, dtype=np.complex128)
        if not np.isfinite(z).all():
            raise ValueError("z must be finite, got NaN or infinity")
        try:
            X = np.linalg.solve(z[..., None, None] * np.eye(self.n) - self.A, self.B + 0j)
        except np.linalg.LinAlgError as error:
            raise ValueError("z must not be a pole of the system") from error
        return self.D + self.C @ X

    def allclose(self, other: StateSpace, rtol: float = 1e-8, atol: float = 1e-10) -> bool:
        """True when all four matrices agree entry by entry (same state, not only the same map).

        Parameters
        ----------
        other : StateSpace
            The system to compare with.
        rtol, atol : float
            Tolerances as in numpy.allclose.

        Returns
        -------
        bool
        """
        pairs = [(getattr(self, name), getattr(other, name)) for name in "ABCD"]
        return all(a.shape == b.shape and np.allclose(a, b, rtol, atol) for a, b in pairs)

    def _inputs(self, u: ArrayLike) -> Array:
        u = as_real_array("u", u, 2)
        if u.shape[0] < 1 or u.shape[1] != self.m:
            raise ValueError(f"u must have shape (T >= 1, m={self.m}), got {u.shape}")
        return u

    def _initial_state(self, x0: ArrayLike | None) -> Array:
        if x0 is None:
            return np.zeros(self.n)
        x0 = as_real_array("x0", x0, 1)
        if x0.shape != (self.n,):
            raise ValueError(f"x0 must have shape ({self.n},), got {x0.shape}")
        return x0


def positive_integer(name: str, value: int) -> int:
    """Return `value` as an int, or raise the ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


# --- x_{t+1} = A x_t + w_t: the one loop of the library ------------------------------------------


def linear_recursion(A: Array, w: Array, x0: Array) -> Array:
    """States of x_{t+1} = A x_t + w_t, for any A; about 3 sqrt(T) steps of Python unless A grows.

    The record is cut into about sqrt(T) blocks of length L. Started from zero, all blocks run side
    by side and yield what their inputs add, f_k; then x_{(k+1)L} = A^L x_{kL} + f_k links the
    blocks; then all blocks run again, from their true first states. Nothing is diagonalised, so
    repeated and defective modes are as exact as in the step-by-step loop. Where a mode grows by
    more than e in L steps, f_k may dwarf states that the inputs keep small: then it is that loop.

    Parameters
    ----------
    A : ndarray, shape (n, n)
        State transition.
    w : ndarray, shape (T, n)
        What is added to the state at each step.
    x0 : ndarray, shape (n,)
        First state.

    Returns
    -------
    ndarray, shape (T + 1, n)
        x_0 .. x_T.
    """
    steps, n = w.shape
    if n == 0:
        return np.zeros((steps + 1, 0))
    if steps <= 64:
        return _run_side_by_side(A, w[:, None, :], x0[None, :])[:, 0]
    L = math.isqrt(steps)
    with np.errstate(over="ignore", invalid="ignore"):
        power = np.linalg.matrix_power(A, L)
    if not np.linalg.norm(power) <= 1 and np.abs(np.linalg.eigvals(A)).max() > math.exp(1 / L):
        return _run_side_by_side(A, w[:, None, :], x0[None, :])[:, 0]
    blocks = -(-steps // L)
    w = np.concatenate([w, np.zeros((blocks * L - steps, n))])
    w = np.ascontiguousarray(w.reshape(blocks, L, n).transpose(1, 0, 2))
    forced = _run_side_by_side(A, w, np.zeros((blocks, n)))[-1]
    first = _run_side_by_side(power, forced[:-1, None, :], x0[None, :])[:, 0]
    x = np.empty((blocks * L + 1, n))
    inside = _run_side_by_side(A, w, first)
    x[:-1].reshape(blocks, L, n)[:] = inside[:-1].transpose(1, 0, 2)
    x[-1] = inside[-1, -1]
    return x[: steps + 1]


def _run_side_by_side(A: Array, w: Array, x0: Array) -> Array:
    """x_{t+1} = A x_t + w_t for many records at once: w (L, r, n), x0 (r, n) -> (L + 1, r, n)."""
    x = np.empty((len(w) + 1, *x0.shape))
    x[0] = x0
    At = np.ascontiguousarray(A.T)
    for t in range(len(w)):
        np.matmul(x[t], At, out=x[t + 1])
        x[t + 1] += w[t]
    return x


def reachability_matrix(A: Array, B: Array, k: int) -> Array:
    """[B, A B, .., A^{k-1} B], shape (n, k m): the states that k inputs can reach from zero."""
    n, m = B.shape
    R = np.empty((k, n, m))
    R[0] = B
    for i in range(1, k):
        np.matmul(A, R[i - 1], out=R[i])
    return R.transpose(1, 0, 2).reshape(n, k * m)


def observability_matrix(A: Array, C: Array, k: int) -> Array:
    """[C; C A; ..; C A^{k-1}], shape (k p, n): what k outputs without input say of the state."""
    return reachability_matrix(A.T, C.T, k).T


# --- interconnections -----------------------------------------------------------------------------


def series(first: StateSpace, second: StateSpace) -> StateSpace:
    """The cascade u -> first -> second -> y, with state [x_first, x_second].

    Parameters
    ----------
    first, second : StateSpace
        The outputs of the first are the inputs of the second.

    Returns
    -------
    StateSpace
        Transfer function G_second(z) G_first(z).

    Raises
    ------
    ValueError
        If first.p differs from second.m.
    """
    if first.p != second.m:
        raise ValueError(f"second must have m = first.p = {first.p} inputs, got m={second.m}")
    A = np.block([[first.A, np.zeros((first.n, second.n))], [second.B @ first.C, second.A]])
    B = np.vstack([first.B, second.B @ first.D])
    C = np.hstack([second.D @ first.C, second.C])
    return StateSpace(A, B, C, second.D @ first.D)


def parallel(sys1: StateSpace, sys2: StateSpace) -> StateSpace:
    """The sum of two systems that share their input, y = y_1 + y_2, with state [x_1, x_2].

    Parameters
    ----------
    sys1, sys2 : StateSpace
        Systems with equal numbers of inputs and of outputs.

    Returns
    -------
    StateSpace
        Transfer function G_1(z) + G_2(z).

    Raises
    ------
    ValueError
        If the numbers of inputs or outputs differ.
    """
    if (sys1.p, sys1.m) != (sys2.p, sys2.m):
        raise ValueError(
            f"sys2 must have (p, m) = {(sys1.p, sys1.m)} like sys1, got {(sys2.p, sys2.m)}"
        )
    A = np.block([[sys1.A, np.zeros((sys1.n, sys2.n))], [np.zeros((sys2.n, sys1.n)), sys2.A]])
    return StateSpace(A, np.vstack([sys1.B, sys2.B]), np.hstack([sys1.C, sys2.C]), sys1.D + sys2.D)


def feedback(plant: StateSpace, controller: StateSpace) -> StateSpace:
    """Negative feedback: u = r - controller(y), from the reference r to the plant's output y.

    Parameters
    ----------
    plant : StateSpace
        G, from u to y.
    controller : StateSpace
        K, from y to what is subtracted from r. For positive feedback negate its C and D.

    Returns
    -------
    StateSpace
        (I + G K)^{-1} G, with state [x_plant, x_controller].

    Raises
    ------
    ValueError
        If the sizes do not fit, or the loop through the two feedthroughs has no unique solution.
    """
    if (controller.p, controller.m) != (plant.m, plant.p):
        raise ValueError(
            f"controller must have (p, m) = {(plant.m, plant.p)}, "
            f"got {(controller.p, controller.m)}"
        )
    # Eliminate y from y = C1 x1 + D1 (r - C2 x2 - D2 y).
    loop = np.eye(plant.p) + plant.D @ controller.D
    if np.linalg.cond(loop) > 1 / np.finfo(float).eps:
        raise ValueError("I + D_plant D_controller must be invertible: the loop is ill-posed")
    C = np.linalg.solve(loop, np.hstack([plant.C, -plant.D @ controller.C]))
    D = np.linalg.solve(loop, plant.D)
    # u = r - C2 x2 - D2 y, with y from the line above.
    Cu = np.hstack([np.zeros((plant.m, plant.n)), -controller.C]) - controller.D @ C
    Du = np.eye(plant.m) - controller.D @ D
    A = np.zeros((plant.n + controller.n, plant.n + controller.n))
    A[: plant.n, : plant.n] = plant.A
    A[plant.n :, plant.n :] = controller.A
    A[: plant.n] += plant.B @ Cu
    A[plant.n :] += controller.B @ C
    B = np.vstack([plant.B @ Du, controller.B @ D])
    return StateSpace(A, B, C, D)
