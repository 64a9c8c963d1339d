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

from realization.sequences.attention import AttentionWeights, attend, up_shift
from realization.sequences.selective import MambaWeights, mamba_layer
from realization.sequences.systems import Array, InputVaryingSystem, Series, Wrapped


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


def residual(system: InputVaryingSystem | Series, norm: Callable[[Array], Array]) -> Wrapped:
    """u + system(norm(u)): a layer in a residual stream."""
    return Wrapped(system, norm, lambda u, y: u + y)


def stacked_hybrid(
    layers: list[tuple[Callable[[Array], Array], InputVaryingSystem | Series]],
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
    d, gp = weights.W_q.shape[1], weights.W_k.shape[0]
    past, block, line, clock = window - 1, 2 * gp + 1, fading.span(window), fading.chunk or 0
    sizes = (past * block, line * (d + 1), clock)
    n, cuts = sum(sizes), np.cumsum(sizes)[:-1]
    project = np.vstack([weights.W_k, weights.W_v])  # (2 g p, d)
    scale = 1 / math.sqrt(weights.head_width)
    norm = fading.norm or (lambda y: y)
    A = np.zeros((n, n))
    parts = (up_shift(past, np.eye(block)), up_shift(line, np.eye(d + 1)), cyclic_shift(clock))
    for part, end in zip(parts, np.cumsum(sizes)):
        A[end - len(part) : end, end - len(part) : end] = part
    tick = np.eye(clock)[:1].sum(axis=0)  # e_0, or nothing
    tick = cyclic_shift(clock) @ tick - tick

    def b(uy: Array) -> Array:
        x = np.zeros(n)
        if past:
            x[cuts[0] - block : cuts[0]] = np.concatenate([project @ uy[:d], [1.0]])
        x[cuts[1] - d - 1 : cuts[1]] = np.concatenate([uy[d:], [1.0]])
        x[cuts[1] :] = tick
        return x

    def B(uy: Array) -> Array:
        slope = np.zeros((n, 2 * d))
        if past:
            slope[cuts[0] - block : cuts[0] - 1, :d] = project
        slope[cuts[1] - d - 1 : cuts[1] - 1, d:] = np.eye(d)
        return slope

    def read(uy: Array, x: Array) -> tuple[Array, Array, NDArray[np.int64]]:
        """Slots [window | token | fading], the fading outputs and their places in the line."""
        register, outputs, hand = np.split(x, cuts)
        register, outputs = register.reshape(past, block), outputs.reshape(line, d + 1)
        phase = int(np.argmax(hand + np.eye(clock)[0])) if clock else 0
        places = line - fading.ages(phase, window)
        own = np.concatenate([project @ uy[:d], [1.0]])
        tokens = np.array([norm(y) for y in outputs[places, :d]])
        faded = np.hstack([tokens @ project.T, outputs[places, d:]])
        return np.vstack([register, own, faded]), outputs[places, :d], places

    def rho(uy: Array, x: Array) -> Array:
        return weights.W_o @ attend(weights, uy[:d], read(uy, x)[0], scale).y.reshape(-1)

    def C(uy: Array, x: Array) -> Array:
        slots, outputs, places = read(uy, x)
        slope = attend(weights, uy[:d], slots, scale).slope(len(slots))  # (h p, slots, 2 g p)
        full = np.zeros((len(slope), n))
        to_register = full[:, : cuts[0]].reshape(-1, past, block)
        to_register[:, :, :-1] = slope[:, :past]
        to_line = full[:, cuts[0] : cuts[1]].reshape(-1, line, d + 1).copy()
        for i, (y, place) in enumerate(zip(outputs, places)):
            chain = project if fading.norm is None else project @ fading.norm.slope(y)
            to_line[:, place, :-1] += slope[:, window + i] @ chain
        full[:, : cuts[0]] = to_register.reshape(len(slope), -1)
        full[:, cuts[0] : cuts[1]] = to_line.reshape(len(slope), -1)
        return weights.W_o @ full

    return InputVaryingSystem(n=n, A=lambda uy: A, b=b, rho=rho, B=B, C=C)


def bmojo_f_layer(
    ssm: MambaWeights,
    attention: AttentionWeights,
    window: int,
    fading: Fading,
    ssm_norm: RmsNorm,
    attention_norm: RmsNorm | None = None,
) -> Series:
    """One B'MOJO-F block in its residual stream, (d,) -> (d,).

    Parameters
    ----------
    attention_norm : RmsNorm, optional
        Given: wiring "stacked", attention reads the stream after the SSM. None: wiring "parallel",
        attention reads what the SSM reads, and the SSM is seen through its fading tokens only.
    """
    d = len(ssm_norm.weight)
    joined = fading_attention(attention, window, fading)
    if attention_norm is None:
        pass_on, norm = (lambda h, y: np.concatenate([h, y])), ssm_norm
    else:
        pass_on, norm = (lambda h, y: np.concatenate([h + y, y])), attention_norm
    return Series(
        (
            Wrapped(mamba_layer(ssm), ssm_norm, pass_on),
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
