"""Hybrids: state spaces and attention stacked (Jamba), and joined in one softmax (B'MOJO-F).

Stacked, in a residual stream:        h <- h + layer(norm h),  layer by layer
Joined, wiring "parallel":            h <- h + Attn([F | window of u], u = norm h),  y = SSM(u)
Joined, wiring "stacked":             h <- h + y,  h <- h + Attn([F | window of norm h])

F_t are fading tokens, past outputs of the SSM projected like inputs:

    token update    F_t = (y_{t-w}, y_{t-w-r}, ..)               just older than the window
    chunk update    F_t = (y_{s-1}, y_{s-1-r}, ..), s = c floor(t / c)    held while a chunk is read

Both are read from a delay line of outputs, so B'MOJO-F's attention still is the constant block
up-shift with a softmax read-out, over two registers:

    x = ( window (k, v, 1) x (w-1) | outputs (y, 1) x L | clock x c )

The chunk update must know where in the chunk it stands: a clock, c numbers turned round once a
token (a cyclic shift, eigenvalues on the unit circle: neither nilpotent nor fading). It is kept
as its difference from the start, so that x_0 = 0 is the beginning of the text.

Symbols: d width, w window, m_f fading tokens, r their stride, c chunk, L length of the delay line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag

from realization.sequences.attention import Attended, AttentionWeights, attend, up_shift
from realization.sequences.selective import (
    MambaWeights,
    SelectiveWeights,
    mamba_layer,
    selective_scan,
)
from realization.sequences.systems import Array, InputVaryingSystem, Series, System, Wrapped


@dataclass(frozen=True)
class RmsNorm:
    """u -> weight * u / rms(u), rms(u)^2 = mean u^2 + eps.

    Attributes
    ----------
    weight : (d,)
    eps : float
    """

    weight: Array
    eps: float = 1e-5

    def __call__(self, u: Array) -> Array:
        return self.weight * u / np.sqrt(np.mean(u * u) + self.eps)

    def slope(self, u: Array) -> Array:
        """Jacobian at u, (d, d)."""
        rms = np.sqrt(np.mean(u * u) + self.eps)
        return self.weight[:, None] * (np.eye(len(u)) - np.outer(u, u) / (len(u) * rms**2)) / rms


@dataclass(frozen=True)
class Fading:
    """How past SSM outputs become tokens.

    Attributes
    ----------
    tokens : int
        m_f >= 1.
    chunk : int or None
        Chunk length c of the chunk update; None for the token update.
    stride : int
        r, spacing of the outputs taken.
    norm : RmsNorm or None
        Applied to an output before it is projected.
    """

    tokens: int = 1
    chunk: int | None = None
    stride: int = 1
    norm: RmsNorm | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, or None; got {self.chunk}")

    def ages(self, phase: int, window: int) -> NDArray[np.int64]:
        """Ages (m_f,) of the outputs shown at ``phase`` of a chunk; y_{t-1} has age 1."""
        newest = window if self.chunk is None else phase + 1
        return newest + self.stride * np.arange(self.tokens)

    def span(self, window: int) -> int:
        """Length of the delay line: the greatest age ever asked for."""
        return int(self.ages((self.chunk or 1) - 1, window)[-1])


def residual(system: System, norm: Callable[[Array], Array]) -> Wrapped:
    """u + system(norm(u)): a layer in a residual stream."""
    return Wrapped(system, norm, lambda u, y: u + y)


def stacked_hybrid(
    layers: list[tuple[Callable[[Array], Array], System]],
) -> Series:
    """Layers, each behind its norm, in one residual stream: Jamba's stack without feed-forwards.

    Parameters
    ----------
    layers : list of (norm, system)
        Systems (d,) -> (d,): `selective.mamba_layer`, `attention.windowed_attention`, ...

    Raises
    ------
    ValueError
        If there is no layer.
    """
    if not layers:
        raise ValueError("layers must hold at least one (norm, system) pair")
    return Series(tuple(residual(system, norm) for norm, system in layers))


def fading_attention(weights: AttentionWeights, window: int, fading: Fading) -> InputVaryingSystem:
    """Attention over the window and over fading tokens; reads (u_t, y_t) (2 d,), gives (d_out,).

    Raises
    ------
    ValueError
        If window < 1.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1; got {window}")
    registers = TwoRegisters(weights, window, fading)
    A = block_diag(
        up_shift(window - 1, np.eye(registers.block)),
        up_shift(registers.line, np.eye(registers.d + 1)),
        cyclic_shift(registers.clock),
    )
    return InputVaryingSystem(
        n=len(A),
        A=lambda uy: A,
        b=registers.write,
        rho=registers.read,
        B=registers.write_slope,
        C=registers.read_slope,
    )


@dataclass(frozen=True)
class TwoRegisters:
    """State of `fading_attention`: window (k, v, 1) x (w-1) | outputs (y, 1) x L | clock x c.

    Attributes
    ----------
    weights, window, fading
        Of the layer.
    """

    weights: AttentionWeights
    window: int
    fading: Fading

    @property
    def d(self) -> int:
        """Width of a token, and of an SSM output."""
        return self.weights.W_q.shape[1]

    @property
    def block(self) -> int:
        """Numbers in one slot (k, v, 1), which are 2 g p + 1."""
        return 2 * len(self.weights.W_k) + 1

    @property
    def line(self) -> int:
        """L, outputs kept."""
        return self.fading.span(self.window)

    @property
    def clock(self) -> int:
        """c, or 0 for the token update, which needs no clock."""
        return self.fading.chunk or 0

    @property
    def project(self) -> Array:
        """[W_k; W_v], (2 g p, d)."""
        return np.vstack([self.weights.W_k, self.weights.W_v])

    def split(self, x: Array) -> tuple[Array, Array, Array]:
        """Views of x as slots (w-1, 2 g p + 1), outputs (L, d + 1), clock (c,)."""
        past, line = self.window - 1, self.line
        first, second = past * self.block, past * self.block + line * (self.d + 1)
        slots, outputs = x[:first].reshape(past, self.block), x[first:second].reshape(line, -1)
        return slots, outputs, x[second:]

    def empty(self) -> Array:
        """A state of zeros: the beginning of the text."""
        return np.zeros((self.window - 1) * self.block + self.line * (self.d + 1) + self.clock)

    def write(self, uy: Array) -> Array:
        """b(u, y): the token into the last slot, y into the last output, one tick of the clock."""
        x = self.empty()
        slots, outputs, hand = self.split(x)
        slots[-1:] = np.append(self.project @ uy[: self.d], 1.0)
        outputs[-1] = np.append(uy[self.d :], 1.0)
        start = np.eye(self.clock)[:1].sum(axis=0)  # the clock is kept as hand - start
        hand += cyclic_shift(self.clock) @ start - start
        return x

    def write_slope(self, uy: Array) -> Array:
        """B(u, y) (n, 2 d): the slope of b."""
        at_zero = self.write(np.zeros(2 * self.d))
        return np.array([self.write(unit) - at_zero for unit in np.eye(2 * self.d)]).T

    def shown(self, x: Array) -> NDArray[np.int64]:
        """Places in the delay line of the fading tokens that a query sees now, (m_f,)."""
        hand = self.split(x)[2]
        phase = int(np.argmax(hand + np.eye(self.clock)[0])) if self.clock else 0
        return self.line - self.fading.ages(phase, self.window)

    def attended(self, uy: Array, x: Array) -> Attended:
        """The joint softmax over slots [window | token | fading]."""
        slots, outputs, _ = self.split(x)
        own = np.append(self.project @ uy[: self.d], 1.0)
        shown = outputs[self.shown(x)]
        norm = self.fading.norm or (lambda y: y)
        tokens = np.array([norm(y) for y in shown[:, :-1]])
        faded = np.hstack([tokens @ self.project.T, shown[:, -1:]])
        scale = 1 / math.sqrt(self.weights.head_width)
        return attend(self.weights, uy[: self.d], np.vstack([slots, own, faded]), scale)

    def read(self, uy: Array, x: Array) -> Array:
        """rho(u, y; x)."""
        return self.weights.W_o @ self.attended(uy, x).y.reshape(-1)

    def read_slope(self, uy: Array, x: Array) -> Array:
        """C (d_out, n): the slope of rho in x, occupancy and clock held fixed."""
        by_slot = self.attended(uy, x).slope(self.window + self.fading.tokens)  # (h p, slots, 2gp)
        outputs, shown, norm = self.split(x)[1], self.shown(x), self.fading.norm
        slope = np.zeros((len(by_slot), len(x)))
        for row, by_head in zip(slope, by_slot):
            to_slots, to_outputs, _ = self.split(row)
            to_slots[:, :-1] = by_head[: self.window - 1]
            for place, by_kv in zip(shown, by_head[self.window :]):
                chain = self.project
                if norm is not None:
                    chain = chain @ norm.slope(outputs[place, :-1])
                to_outputs[place, :-1] += by_kv @ chain
        return self.weights.W_o @ slope


def bmojo_f_layer(
    ssm: MambaWeights,
    attention: AttentionWeights,
    window: int,
    fading: Fading,
    ssm_norm: RmsNorm,
    attention_norm: RmsNorm | None = None,
    scan: Callable[[SelectiveWeights], System] = selective_scan,
) -> Series:
    """One B'MOJO-F block in its residual stream, (d,) -> (d,).

    Parameters
    ----------
    attention_norm : RmsNorm, optional
        Given: wiring "stacked", attention reads the stream after the SSM. None: wiring "parallel",
        attention reads what the SSM reads, and the SSM is seen through its fading tokens only.
    scan : callable
        The SSM's realization. With `companions.WindowedScan` both halves are block companions: the
        block in the paper's canonical form, exactly.
    """
    d = len(ssm_norm.weight)
    joined = fading_attention(attention, window, fading)
    if attention_norm is None:
        pass_on, norm = (lambda h, y: np.concatenate([h, y])), ssm_norm
    else:
        pass_on, norm = (lambda h, y: np.concatenate([h + y, y])), attention_norm
    return Series(
        (
            Wrapped(mamba_layer(ssm, scan), ssm_norm, pass_on),
            Wrapped(
                joined,
                lambda hy: np.concatenate([norm(hy[:d]), hy[d:]]),
                lambda hy, out: hy[:d] + out,
            ),
        )
    )


def cyclic_shift(size: int) -> Array:
    """Permutation that moves entry i to i + 1, the last to the first; (size, size)."""
    return np.roll(np.eye(size), 1, axis=0)
