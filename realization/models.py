"""The two descriptions of a stochastic system that the rest of the package passes around.

    x_{t+1} = A x_t + B u_t + w_t          E [w_t; v_t] [w_s; v_s]' = [Q  S; S' R] delta_{ts}
    y_t     = C x_t + D u_t + v_t                                       (StochasticRealization)

    x_{t+1} = A x_t + B u_t + K e_t        E e_t e_s' = Lambda delta_{ts}
    y_t     = C x_t + D u_t + e_t                                       (InnovationModel)

The second is the special case in which one white noise drives state and output, so that the state
can be computed from the past outputs alone: w = K e, v = e, hence

    Q = K Lambda K',   S = K Lambda,   R = Lambda.

Many stochastic realizations have the same outputs (in distribution); the innovation model is the
one that can be run as a predictor.

Glossary
    n, m, p       orders of state, input, output      A (n, n)  B (n, m)  C (p, n)  D (p, m)
    w, v          state noise (n,), output noise (p,)  Q (n, n)  S (n, p)  R (p, p)
    e             innovation (p,)                      K (n, p)  Lambda (p, p)
    Pi (n, n)     state covariance, Pi = A Pi A' + Q   G (n, p) = E x_{t+1} y_t' = A Pi C' + S
    L_k (p, p)    output covariance E y_{t+k} y_t'     L_0 = C Pi C' + R,  L_k = C A^{k-1} G

Source: Lindquist and Picci, Linear Stochastic Systems (2015), chapters 6 and 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from realization.systems import (
    Array,
    StateSpace,
    as_real_array,
    linear_recursion,
    positive_integer,
    reachability_matrix,
)

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, repr=False)
class InnovationModel:
    """x_{t+1} = A x_t + B u_t + K e_t, y_t = C x_t + D u_t + e_t, cov(e_t) = Lambda.

    Parameters
    ----------
    A : array_like, shape (n, n)
        State transition.
    K : array_like, shape (n, p)
        Gain: how the state is corrected by the innovation.
    C : array_like, shape (p, n)
        Output matrix.
    Lambda : array_like, shape (p, p)
        Covariance of the innovation, symmetric positive semidefinite, units of y squared.
    B : array_like, shape (n, m), optional
        Input matrix; None for a model without inputs.
    D : array_like, shape (p, m), optional
        Feedthrough; zero when B is given and D is not.
    x0 : array_like, shape (n,), optional
        State at the start of the record from which the model was identified.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or Lambda is not a covariance.
    """

    A: ArrayLike
    K: ArrayLike
    C: ArrayLike
    Lambda: ArrayLike
    B: ArrayLike | None = None
    D: ArrayLike | None = None
    x0: ArrayLike | None = None

    def __post_init__(self) -> None:
        n, _, p = _freeze_system(self)
        _freeze(self, "K", (n, p))
        _freeze_covariance(self, "Lambda", p)
        if self.x0 is not None:
            _freeze(self, "x0", (n,))

    def __repr__(self) -> str:
        return f"InnovationModel(n={self.n}, m={self.m}, p={self.p})"

    n = property(lambda self: self.A.shape[0], doc="Order: the dimension of the state.")
    p = property(lambda self: self.C.shape[0], doc="Number of outputs.")
    m = property(lambda self: 0 if self.B is None else self.B.shape[1], doc="Number of inputs.")
    Q = property(lambda self: self.K @ self.Lambda @ self.K.T, doc="K Lambda K', shape (n, n).")
    S = property(lambda self: self.K @ self.Lambda, doc="K Lambda, shape (n, p).")
    R = property(lambda self: self.Lambda, doc="Lambda, shape (p, p).")

    @property
    def predictor(self) -> StateSpace:
        """The system [u_t; y_t] -> yhat_t: (A - K C, [B - K D, K], C, [D, 0]), m + p inputs."""
        A, B, D = self.A - self.K @ self.C, self.K, np.zeros((self.p, self.p))
        if self.B is not None:
            B, D = np.hstack([self.B - self.K @ self.D, B]), np.hstack([self.D, D])
        return StateSpace(A, B, self.C, D)

    @property
    def deterministic(self) -> StateSpace:
        """The system u_t -> E y_t: (A, B, C, D). ValueError for a model without inputs."""
        if self.B is None:
            raise ValueError("this model has no inputs (B is None), so no deterministic part")
        return StateSpace(self.A, self.B, self.C, self.D)

    @property
    def stochastic(self) -> StateSpace:
        """The shaping filter e_t -> y_t: (A, K, C, I)."""
        return StateSpace(self.A, self.K, self.C, np.eye(self.p))

    def transform(self, T: ArrayLike) -> InnovationModel:
        """The same model in the coordinates x' = T x.

        Parameters
        ----------
        T : array_like, shape (n, n)
            Invertible change of basis.

        Returns
        -------
        InnovationModel

        Raises
        ------
        ValueError
            If T has another shape or is singular.
        """
        s = self.stochastic.transform(T)
        B = None if self.B is None else np.asarray(T, float) @ self.B
        x0 = None if self.x0 is None else np.asarray(T, float) @ self.x0
        return InnovationModel(s.A, s.B, s.C, self.Lambda, B, self.D, x0)

    def simulate(
        self,
        num_steps: int,
        seed: int,
        u: ArrayLike | None = None,
        x0: ArrayLike | None = None,
    ) -> Array:
        """A sample of the outputs, shape (num_steps, p), Gaussian; see `simulate_realization`."""
        return simulate_realization(self, num_steps, seed, u, x0)


@dataclass(frozen=True, eq=False, repr=False)
class StochasticRealization:
    """x_{t+1} = A x_t + B u_t + w_t, y_t = C x_t + D u_t + v_t, with white noises w and v.

    Parameters
    ----------
    A, C : array_like, shapes (n, n) and (p, n)
        State transition and output matrix.
    Q, R : array_like, shapes (n, n) and (p, p)
        Covariances of w and v.
    S : array_like, shape (n, p), optional
        Cross-covariance E w_t v_t'; zero when left out.
    B, D : array_like, shapes (n, m) and (p, m), optional
        Input matrices; None for a model without inputs, D zero when only B is given.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or [Q S; S' R] is not a covariance.
    """

    A: ArrayLike
    C: ArrayLike
    Q: ArrayLike
    R: ArrayLike
    S: ArrayLike | None = None
    B: ArrayLike | None = None
    D: ArrayLike | None = None

    def __post_init__(self) -> None:
        n, _, p = _freeze_system(self)
        if self.S is None:
            object.__setattr__(self, "S", np.zeros((n, p)))
        _freeze(self, "S", (n, p))
        _freeze_covariance(self, "Q", n)
        _freeze_covariance(self, "R", p)
        joint = np.block([[self.Q, self.S], [self.S.T, self.R]])
        if not _is_covariance(joint):
            raise ValueError(
                "[Q S; S' R] must be positive semidefinite, its smallest eigenvalue is "
                f"{np.linalg.eigvalsh(joint)[0]:.3g}"
            )

    def __repr__(self) -> str:
        return f"StochasticRealization(n={self.n}, m={self.m}, p={self.p})"

    n = property(lambda self: self.A.shape[0], doc="Order: the dimension of the state.")
    p = property(lambda self: self.C.shape[0], doc="Number of outputs.")
    m = property(lambda self: 0 if self.B is None else self.B.shape[1], doc="Number of inputs.")

    def simulate(
        self,
        num_steps: int,
        seed: int,
        u: ArrayLike | None = None,
        x0: ArrayLike | None = None,
    ) -> Array:
        """A sample of the outputs, shape (num_steps, p), Gaussian; see `simulate_realization`."""
        return simulate_realization(self, num_steps, seed, u, x0)


StochasticModel = InnovationModel | StochasticRealization


def simulate_realization(
    model: StochasticModel,
    num_steps: int,
    seed: int,
    u: ArrayLike | None = None,
    x0: ArrayLike | None = None,
) -> Array:
    """Draw outputs from a stochastic model with Gaussian noise.

    Parameters
    ----------
    model : InnovationModel or StochasticRealization
        The model.
    num_steps : int
        Length T of the record.
    seed : int
        Seed of numpy's default generator.
    u : array_like, shape (T, m), optional
        Inputs, needed exactly when the model has inputs.
    x0 : array_like, shape (n,), optional
        First state. Left out, it is drawn from the stationary distribution of the noise-driven
        state when A is stable, and zero otherwise.

    Returns
    -------
    ndarray, shape (T, p)

    Raises
    ------
    ValueError
        If u is missing, superfluous or of another shape, or x0 is of another shape.
    """
    T = positive_integer("num_steps", num_steps)
    rng = np.random.default_rng(seed)
    u = checked_inputs(model, u, T)
    noise_factor = covariance_factor(np.block([[model.Q, model.S], [model.S.T, model.R]]))
    noise = rng.standard_normal((T, model.n + model.p)) @ noise_factor.T
    w, v = noise[:, : model.n], noise[:, model.n :]
    if x0 is not None:
        x0 = as_real_array("x0", x0, 1)
        if x0.shape != (model.n,):
            raise ValueError(f"x0 must have shape ({model.n},), got {x0.shape}")
    elif np.abs(np.linalg.eigvals(model.A)).max(initial=0.0) < 1:
        x0 = covariance_factor(state_covariance(model)) @ rng.standard_normal(model.n)
    else:
        x0 = np.zeros(model.n)
    if u is not None:
        w, v = w + u @ model.B.T, v + u @ model.D.T
    return linear_recursion(model.A, np.ascontiguousarray(w), x0)[:-1] @ model.C.T + v


# --- second-order statistics of a model -----------------------------------------------------------


def state_covariance(model: StochasticModel) -> Array:
    """Pi = A Pi A' + Q, the stationary covariance of the noise-driven state, shape (n, n).

    Raises
    ------
    ValueError
        If A is not stable.
    """
    if model.n == 0:
        return np.zeros((0, 0))
    radius = np.abs(np.linalg.eigvals(model.A)).max()
    if radius >= 1:
        raise ValueError(f"A must be stable, its spectral radius is {radius:.6g}")
    P, power = model.Q, model.A
    for _ in range(64):  # doubling: P holds 2^k terms of sum_j A^j Q A'^j, power is A^(2^k)
        step = power @ P @ power.T
        P, power = symmetric_part(P + step), power @ power
        size = np.sqrt(np.diag(P))
        if (np.abs(step) <= np.finfo(float).eps * np.outer(size, size)).all():
            return P
    raise ValueError(f"A must be stable: its powers do not decay (spectral radius {radius:.6g})")


def covariance_parameters(model: StochasticModel) -> tuple[Array, Array, Array, Array]:
    """(A, C, G, L0) of the output process: G = A Pi C' + S, L0 = C Pi C' + R.

    Parameters
    ----------
    model : InnovationModel or StochasticRealization
        A stable model; its inputs are taken as zero.

    Returns
    -------
    A, C, G, L0 : ndarrays, shapes (n, n), (p, n), (n, p), (p, p)

    Raises
    ------
    ValueError
        If A is not stable.
    """
    Pi = state_covariance(model)
    G = model.A @ Pi @ model.C.T + model.S
    return model.A, model.C, G, symmetric_part(model.C @ Pi @ model.C.T + model.R)


def output_covariances(A: Array, C: Array, G: Array, L0: Array, k: int) -> Array:
    """Covariances L_0 .. L_{k-1} with L_i = C A^{i-1} G, shape (k, p, p)."""
    k = positive_integer("k", k)
    p = np.shape(G)[1]
    R = reachability_matrix(np.asarray(A, float), np.asarray(G, float), max(k - 1, 1))
    L = (np.asarray(C, float) @ R).reshape(p, -1, p).transpose(1, 0, 2)
    return np.concatenate([np.asarray(L0, float)[None], L])[:k]


# --- small matrix helpers -------------------------------------------------------------------------


def symmetric_part(M: Array) -> Array:
    """(M + M') / 2."""
    return (M + M.T) / 2


def covariance_factor(M: Array) -> Array:
    """F with F F' = M, for M positive semidefinite, by its eigenvectors; shape of M."""
    values, vectors = np.linalg.eigh(symmetric_part(M))
    return vectors * np.sqrt(np.clip(values, 0, None))


def checked_inputs(model: StochasticModel, u: ArrayLike | None, T: int) -> Array | None:
    """Inputs as a (T, m) array, or None for a model without inputs; ValueError otherwise."""
    if model.m == 0:
        if u is not None:
            raise ValueError("u was given, but the model has no inputs (B is None)")
        return None
    if u is None:
        raise ValueError(f"u must be given: the model has {model.m} inputs")
    u = as_real_array("u", u, 2)
    if u.shape != (T, model.m):
        raise ValueError(f"u must have shape {(T, model.m)}, got {u.shape}")
    return u


def _is_covariance(M: Array) -> bool:
    """Symmetric and positive semidefinite, each variable in its own units.

    Rounding errors of the size of the largest variance are forgiven to all.
    """
    if M.size == 0:
        return True
    largest = np.abs(M).max()
    if not np.allclose(M, M.T, rtol=1e-8, atol=1e-10 * largest):
        return False
    M = symmetric_part(M) + 8 * len(M) * np.finfo(float).eps * largest * np.eye(len(M))
    size = np.sqrt(np.maximum(np.diag(M), 0.0))
    if not size.all():  # a variance below zero, unless all of M is zero
        return not largest
    values = np.linalg.eigvalsh(M / size / size[:, None])
    return bool(values[0] >= -1e-9 * values[-1])


def _freeze(model: object, name: str, shape: tuple[int, ...]) -> None:
    value = as_real_array(name, getattr(model, name), len(shape))
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
    value.setflags(write=False)
    object.__setattr__(model, name, value)


def _freeze_covariance(model: object, name: str, size: int) -> None:
    _freeze(model, name, (size, size))
    if not _is_covariance(getattr(model, name)):
        raise ValueError(f"{name} must be symmetric positive semidefinite")


def _freeze_system(model: object) -> tuple[int, int, int]:
    """Check and store A, C, B and D; return (n, m, p)."""
    n = as_real_array("A", model.A, 2).shape[0]
    p = as_real_array("C", model.C, 2).shape[0]
    if p < 1:
        raise ValueError("C must have at least one row (an output)")
    _freeze(model, "A", (n, n))
    _freeze(model, "C", (p, n))
    if model.B is None:
        if model.D is not None:
            raise ValueError("D was given without B: a model with inputs needs both or only B")
        return n, 0, p
    m = as_real_array("B", model.B, 2).shape[1]
    _freeze(model, "B", (n, m))
    if model.D is None:
        object.__setattr__(model, "D", np.zeros((p, m)))
    _freeze(model, "D", (p, m))
    return n, m, p
