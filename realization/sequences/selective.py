"""Mamba's selective scan: a diagonal input-varying system, from the projections up.

    Delta = softplus(P_up P_down u + bias)      B = P_B u      C = P_C u                (appendix E)
    h_t = exp(Delta_t A) * h_{t-1} + (Delta_t u_t) B_t^T,   y_t = h_t C_t + D * u_t

h_t is read *after* token t has been written. In this package's form the state is what stands before
the token, x_t = h_{t-1}, so the write is folded into the read-out:

    A(u) = diag exp(Delta A)     b(u) = vec (Delta u) B^T     rho(u, x) = (A(u) x + b(u)) C + D * u

A(u) is diagonal and stable (A < 0, Delta > 0), so the memory fades; a pole at 1 needs Delta = 0.
With the token fixed each channel is its own system of n states, one input u_{t,e} and one output.

Symbols
    e   channels (the paper's d)     n   states a channel     r   rank of Delta's projection
    P_up (e, r)   P_down (r, e)   P_B, P_C (n, e)   A (e, n)   D, bias (e,)   state (e, n) by rows

Bilinear (E.1): exp(Delta A) = 1 + Delta A + O(Delta^2). To first order the system is linear in
the state, linear in an augmented input w(u) = (Delta, vec (Delta u) B^T), and in their product:

    x_{t+1} = x_t + sum_i w_i(u_t) N_i x_t + G w(u_t)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from realization.sequences.attention import up_shift
from realization.sequences.systems import (
    Array,
    InputVaryingSystem,
    Series,
    System,
    Wrapped,
    as_sequence,
)
from realization.sequences.trajectory import LinearTrajectory
from realization.systems import as_real_array


@dataclass(frozen=True)
class SelectiveWeights:
    """Weights of a selective scan; shapes in the module's docstring."""

    P_up: Array
    P_down: Array
    P_B: Array
    P_C: Array
    A: Array
    D: Array
    bias: Array

    def __post_init__(self) -> None:
        for name in ("P_up", "P_down", "P_B", "P_C", "A", "D", "bias"):
            given = getattr(self, name)
            object.__setattr__(self, name, as_real_array(name, given, np.ndim(given)))
        if self.A.ndim != 2 or self.P_up.ndim != 2:
            raise ValueError(f"A and P_up must be matrices; got {self.A.shape}, {self.P_up.shape}")
        (e, n), r = self.A.shape, self.P_up.shape[1]
        shapes = {"P_up": (e, r), "P_down": (r, e), "P_B": (n, e), "P_C": (n, e)}
        for name, shape in {**shapes, "D": (e,), "bias": (e,)}.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}; got {getattr(self, name).shape}")

    def delta(self, u: Array) -> Array:
        """Delta(u) (.., e) for u (.., e)."""
        return softplus(u @ self.P_down.T @ self.P_up.T + self.bias)


@dataclass(frozen=True)
class MambaWeights:
    """A whole Mamba layer: in-projection, short convolution, scan, gate, out-projection.

    Attributes
    ----------
    W_in : (2 e, d)
        Token to (scan's branch, gate).
    taps, conv_bias : (e, k), (e,)
        Depthwise convolution; the last tap multiplies the newest token.
    scan : SelectiveWeights
    W_out : (d, e)
    in_bias, out_bias : (2 e,), (d,), optional
    """

    W_in: Array
    taps: Array
    conv_bias: Array
    scan: SelectiveWeights
    W_out: Array
    in_bias: Array | float = 0.0
    out_bias: Array | float = 0.0


def softplus(x: Array) -> Array:
    """log(1 + e^x), without overflow."""
    return np.logaddexp(0.0, x)


def silu(x: Array) -> Array:
    """x / (1 + e^-x), without overflow."""
    return x * np.exp(-np.logaddexp(0.0, -x))


def selective_scan(weights: SelectiveWeights) -> InputVaryingSystem:
    """The selective scan as an input-varying system with n = e * n states; token (e,) -> (e,)."""
    return scan_system(weights, lambda decay: np.exp(decay))


def bilinear_scan(weights: SelectiveWeights) -> InputVaryingSystem:
    """Appendix E.1: the scan with exp(Delta A) replaced by 1 + Delta A."""
    return scan_system(weights, lambda decay: 1.0 + decay)


def scan_system(
    weights: SelectiveWeights, discretize: Callable[[Array], Array]
) -> InputVaryingSystem:
    """The scan whose transition is ``discretize(Delta A)``, entry by entry."""
    e, n = weights.A.shape
    channel = np.kron(np.eye(e), np.ones(n))  # (e, e n): sums each channel's states

    def transition(u: Array) -> Array:  # diagonal, (e n,)
        return discretize(weights.delta(u)[:, None] * weights.A).reshape(-1)

    def B(u: Array) -> Array:  # (e n, e)
        per_channel = weights.delta(u)[:, None] * (weights.P_B @ u)
        return (channel * per_channel.reshape(-1)).T

    def C(u: Array, x: Array) -> Array:  # (e, e n): the read-out of x_t, before the write
        return channel * np.tile(weights.P_C @ u, e) * transition(u)

    def rho(u: Array, x: Array) -> Array:
        after = transition(u) * x + B(u) @ u
        return after.reshape(e, n) @ (weights.P_C @ u) + weights.D * u

    return InputVaryingSystem(
        n=e * n, A=lambda u: np.diag(transition(u)), b=lambda u: B(u) @ u, rho=rho, B=B, C=C
    )


def channel_trajectory(weights: SelectiveWeights, u: ArrayLike, channel: int) -> LinearTrajectory:
    """One channel of the scan along tokens u (l, e): n states, input v_t = u_{t,channel}.

    A_t = diag exp(Delta_t A), B_t = Delta_t B(u_t), C_t = C(u_t)^T A_t, D_t = C(u_t)^T B_t + D:
    all of them functions of the token u_t alone, the strictly causal form of y_t = C_t h_t + D
    u_t.
    """
    u = as_sequence(u, "u", len(weights.A))
    if not 0 <= channel < len(weights.A):
        raise ValueError(f"channel must be in 0 .. {len(weights.A) - 1}; got {channel}")
    delta = weights.delta(u)[:, channel, None]
    decay = np.exp(delta * weights.A[channel])  # (l, n)
    write, read = delta * (u @ weights.P_B.T), u @ weights.P_C.T
    return LinearTrajectory(
        A=decay[:, :, None] * np.eye(decay.shape[1]),
        B=write[:, :, None],
        C=(read * decay)[:, None, :],
        D=((read * write).sum(axis=1) + weights.D[channel])[:, None, None],
    )


def mamba_layer(
    weights: MambaWeights, scan: Callable[[SelectiveWeights], System] = selective_scan
) -> Series:
    """A Mamba layer: a shift register (the convolution) in series with the gated scan.

    The register is nilpotent of order k - 1, the scan diagonal. The scan's A depends on the
    convolution's output, so on u_{t-k+1} .. u_t: the whole layer is A(u_t, x_t), not A(u_t).

    Parameters
    ----------
    weights : MambaWeights
    scan : callable
        Which realization of the scan: `selective_scan`, or one equivalent to it.
    """
    e = len(weights.taps)
    if weights.W_in.shape[0] != 2 * e or weights.W_out.shape[1] != e:
        raise ValueError(
            f"W_in must have {2 * e} rows and W_out {e} columns, as taps has {e} rows; "
            f"got {weights.W_in.shape} and {weights.W_out.shape}"
        )
    gated = Wrapped(
        scan(weights.scan),
        before=lambda cz: cz[:e],
        after=lambda cz, y: weights.W_out @ (y * silu(cz[e:])) + weights.out_bias,
    )
    return Series((convolution(weights), gated))


def convolution(weights: MambaWeights) -> InputVaryingSystem:
    """Token (d,) -> (silu of the convolved branch, gate) (2 e,); state: the last k - 1 branches."""
    e, k = weights.taps.shape
    past = (k - 1) * e
    A = up_shift(k - 1, np.eye(e))
    enter = np.eye(past)[:, past - e :] if past else np.zeros((0, e))
    in_bias = np.broadcast_to(weights.in_bias, (2 * e,))

    def branches(u: Array) -> tuple[Array, Array]:
        return tuple(np.split(weights.W_in @ u + in_bias, 2))

    def convolved(u: Array, x: Array) -> Array:
        window = np.vstack([x.reshape(k - 1, e), branches(u)[0]])
        return (window * weights.taps.T).sum(axis=0) + weights.conv_bias

    def C(u: Array, x: Array) -> Array:
        c = convolved(u, x)
        sigmoid = np.exp(-np.logaddexp(0.0, -c))
        slope = sigmoid * (1 + c * (1 - sigmoid))
        held = np.hstack([np.diag(tap) for tap in weights.taps.T[:-1]]) if past else np.eye(e, 0)
        return np.vstack([slope[:, None] * held, np.zeros((e, past))])

    return InputVaryingSystem(
        n=past,
        A=lambda u: A,
        b=lambda u: enter @ branches(u)[0],
        rho=lambda u, x: np.concatenate([silu(convolved(u, x)), branches(u)[1]]),
        B=lambda u: enter @ weights.W_in[:e],
        C=C,
    )


# -- bilinear form (E.1) --------------------------------------------------------------------------


def augmented_input(weights: SelectiveWeights, u: ArrayLike) -> Array:
    """w(u) = (Delta, vec (Delta u) B^T), (l, e + e n) for tokens u (l, e)."""
    u = as_sequence(u, "u", len(weights.A))
    delta = weights.delta(u)
    write = np.einsum("le,ln->len", delta * u, u @ weights.P_B.T)
    return np.hstack([delta, write.reshape(len(u), -1)])


def bilinear_matrices(weights: SelectiveWeights) -> tuple[Array, Array]:
    """Constant N (e + e n, e n, e n), G (e n, e + e n):  x_{t+1} = x + sum_i w_i N_i x + G w."""
    e, n = weights.A.shape
    N = np.zeros((e + e * n, e * n, e * n))
    for i in range(e):
        N[i] = np.diag(np.kron(np.eye(e)[i], weights.A[i]))
    return N, np.hstack([np.zeros((e * n, e)), np.eye(e * n)])


# -- loading a state (appendix B.2) ------------------------------------------------------------


def loading_prompt(x0: ArrayLike, A: ArrayLike, step: float = 0.01) -> tuple[Array, Array, Array]:
    """h = n extra tokens that put a scan, started from zero, in the state x0.

    Token i writes column i of x0 with B_i one-hot. The paper's recursion has the transition 1 and
    the write B_i x0_i. A scan that only knows Delta cannot have both: its transition exp(Delta A)
    is 1 only for Delta = 0, when nothing is written. With a step Delta > 0 column i then decays
    over the h - 1 - i tokens after it, which is undone in advance:

        u_i = x0[:, i] exp(-(h - 1 - i) Delta A[:, i]) / Delta

    Parameters
    ----------
    x0, A : (e, n)
        State to load; the scan's A.
    step : float
        Delta > 0 of the prompt. Small is well conditioned: values grow as exp(h Delta |A|) / Delta.

    Returns
    -------
    u, delta, B : (n, e), (n, e), (n, n)
        Inputs of the scan for the n prompt tokens. Their outputs are to be thrown away.

    Raises
    ------
    ValueError
        If step is not positive or shapes differ.
    """
    x0, A = as_real_array("x0", x0, 2), as_real_array("A", A, 2)
    if x0.shape != A.shape:
        raise ValueError(f"x0 and A must have one shape (e, n); got {x0.shape} and {A.shape}")
    if not step > 0:
        raise ValueError(f"step must be positive: at 0 a scan writes nothing; got {step}")
    h = x0.shape[1]
    later = np.arange(h)[::-1]
    u = x0 * np.exp(-later * step * A) / step
    return u.T, np.full(u.T.shape, step), np.eye(h)
