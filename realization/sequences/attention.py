"""Attention as a nilpotent system: a shift register of the past, read by a (soft) match.

Softmax attention over a window of w tokens, the query's own included, stores N = w - 1 of them:

    x = (s_1, ..., s_N),  s_j = (k, v, 1) of the token N + 1 - j steps ago;  s = 0: empty slot
    A = block up-shift:  s_j <- s_{j+1},  s_N <- 0        nilpotent of order N, constant
    b(u) = (0, ..., 0, (k(u), v(u), 1))                   the newest block is the token's
    rho(u, x) = W_o sum_j softmax_j(scale q(u) . k_j) v_j   over occupied slots and the token itself

The third entry of a block, its *occupancy*, is what the paper's 2 V N numbers leave out: without it
a zero block is a token with score 0, and the first N outputs are wrong.

Rotary positions put a rotation R in place of each identity above the diagonal: a shift turns the
stored key by one position. The newest key is one position old when it is first read, so it is
written turned once: the last block of b(u) is (R k(u), v(u), 1). A is a block up-shift of
rotations, nilpotent of the same order.

Linear attention drops the softmax, y_t = sum_{j <= t} (q_t . k_j) v_j, and has three
realizations: a shift register as long as the text (FIR), a running sum S_t = S_{t-1} + v_t k_t^T
(A = I: permanent memory), and, for a window of w tokens, a sliding sum S_t = S_{t-1} + v_t k_t^T
- v_{t-w} k_{t-w}^T.

Symbols
    d   width of a token          h, g   query heads, key-value heads (g divides h)
    p   head width (V)            w      window, own token included;  N = w - 1
    W_q (h p, d)   W_k, W_v (g p, d)   W_o (d_out, h p)
Source: section 3.1 and appendix C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from realization.sequences.systems import Array, InputVaryingSystem
from realization.systems import as_real_array


@dataclass(frozen=True)
class AttentionWeights:
    """Projections of one attention layer (biases are zero).

    Attributes
    ----------
    W_q, W_k, W_v, W_o : (h p, d), (g p, d), (g p, d), (d_out, h p)
        Query, key, value and output projections.
    heads, kv_heads : int
        h and g.
    """

    W_q: Array
    W_k: Array
    W_v: Array
    W_o: Array
    heads: int = 1
    kv_heads: int = 1

    def __post_init__(self) -> None:
        for name in ("W_q", "W_k", "W_v", "W_o"):
            given = getattr(self, name)
            object.__setattr__(self, name, as_real_array(name, given, np.ndim(given)))
        if min(self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads; got {self.heads=}, {self.kv_heads=}")
        if self.W_q.ndim != 2 or self.W_q.shape[0] % self.heads:
            raise ValueError(f"W_q must be (heads * p, d); got {self.W_q.shape}, {self.heads=}")
        p, d = self.head_width, self.W_q.shape[1]
        for name in ("W_k", "W_v"):
            if getattr(self, name).shape != (self.kv_heads * p, d):
                shape = getattr(self, name).shape
                raise ValueError(f"{name} must have shape {(self.kv_heads * p, d)}; got {shape}")
        if self.W_o.ndim != 2 or self.W_o.shape[1] != self.heads * p:
            raise ValueError(f"W_o must have {self.heads * p} columns; got {self.W_o.shape}")

    @property
    def head_width(self) -> int:
        """p, the paper's V."""
        return self.W_q.shape[0] // self.heads


@dataclass(frozen=True)
class Attended:
    """One query's softmax over slots, and its slope.

    Attributes
    ----------
    q, weight, y : (h, p), (w, h), (h, p)
        Query, softmax weights (zero in empty slots), output of each head.
    v : (w, h, p)
        Values, repeated for the heads that share them.
    scale : float
    kv_heads : int
        g.
    """

    q: Array
    weight: Array
    y: Array
    v: Array
    scale: float
    kv_heads: int

    def slope(self, count: int) -> Array:
        """dy / d(k, v) of the first ``count`` slots, (h p, count, 2 g p).

        dy/dv_j = weight_j I,   dy/dk_j = scale weight_j (v_j - y) q^T
        """
        (h, p), g = self.q.shape, self.kv_heads
        slope = np.zeros((h, p, count, 2, g, p))
        for head in range(h):
            kv, weight = head // (h // g), self.weight[:count, head]
            off = self.v[:count, head] - self.y[head]
            slope[head, :, :, 0, kv] = self.scale * np.einsum(
                "w,wp,r->pwr", weight, off, self.q[head]
            )
            slope[head, :, :, 1, kv] = np.einsum("w,pr->pwr", weight, np.eye(p))
        return slope.reshape(h * p, count, 2 * g * p)


def attend(weights: AttentionWeights, u: Array, slots: Array, scale: float) -> Attended:
    """softmax_j(scale q(u) . k_j) v_j over the occupied slots (w, 2 g p + 1) = (k, v, occupied).

    At least one slot must be occupied: the token's own always is.
    """
    h, g, p = weights.heads, weights.kv_heads, weights.head_width
    q = (weights.W_q @ u).reshape(h, p)
    k, v = slots[:, :-1].reshape(len(slots), 2, g, p).repeat(h // g, axis=2).swapaxes(0, 1)
    score = scale * np.einsum("hp,whp->wh", q, k)
    score = np.where(slots[:, -1:] > 0.5, score, -np.inf)
    weight = np.exp(score - score.max(axis=0))
    weight /= weight.sum(axis=0)
    return Attended(q, weight, np.einsum("wh,whp->hp", weight, v), v, scale, g)


def up_shift(blocks: int, block: ArrayLike) -> Array:
    """Block up-shift, (blocks s, blocks s): ``block`` (s, s) above the diagonal, else zeros."""
    return np.kron(np.eye(blocks, k=1), np.asarray(block, dtype=float))


def rotation(angles: ArrayLike) -> Array:
    """R with (R k)_i = k_i cos - k_{i+p/2} sin, (R k)_{i+p/2} = k_i sin + k_{i+p/2} cos.

    Parameters
    ----------
    angles : (p / 2,)
        Angle of each plane, in radians a position (RoPE's inverse frequencies).

    Returns
    -------
    (p, p)
    """
    cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    return np.block([[cos, -sin], [sin, cos]])


def windowed_attention(
    weights: AttentionWeights,
    window: int,
    scale: float | None = None,
    angles: ArrayLike | None = None,
) -> InputVaryingSystem:
    """Causal softmax attention over the last ``window`` tokens, its own included.

    Parameters
    ----------
    weights : AttentionWeights
    window : int
        w >= 1; the state holds N = w - 1 tokens, n = N (2 g p + 1).
    scale : float, optional
        Factor on the scores, 1 / sqrt(p) by default.
    angles : (p / 2,), optional
        Rotary positions, radians a position; none by default.

    Raises
    ------
    ValueError
        If window < 1 or the angles do not fit the head width.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 (the token itself); got {window}")
    h, g, p = weights.heads, weights.kv_heads, weights.head_width
    scale = 1 / math.sqrt(p) if scale is None else scale
    angles = np.zeros(p // 2) if angles is None else np.asarray(angles, dtype=float)
    turn = rotation(angles) if angles.any() else np.eye(p)
    if turn.shape != (p, p):
        raise ValueError(f"angles must have shape ({p // 2},) for head width {p}")
    past, block = window - 1, 2 * g * p + 1
    advance = np.eye(block)  # one shift: every key ages by one position
    advance[: g * p, : g * p] = np.kron(np.eye(g), turn.T)
    A = up_shift(past, advance)
    write = np.vstack([weights.W_k, weights.W_v])  # (2 g p, d)
    # the newest stored key is one position old when it is next read
    enter = np.zeros((past * block, block))
    if past:
        enter[-block:] = advance

    def token(u: Array) -> Array:
        return np.concatenate([write @ u, [1.0]])

    def slots(u: Array, x: Array) -> Array:
        return np.vstack([x.reshape(past, block), token(u)])

    def rho(u: Array, x: Array) -> Array:
        return weights.W_o @ attend(weights, u, slots(u, x), scale).y.reshape(-1)

    def C(u: Array, x: Array) -> Array:
        slope = attend(weights, u, slots(u, x), scale).slope(past)  # (h p, past, 2 g p)
        slope = np.concatenate([slope, np.zeros((h * p, past, 1))], axis=2)
        return weights.W_o @ slope.reshape(h * p, past * block)

    return InputVaryingSystem(
        n=past * block,
        A=lambda u: A,
        b=lambda u: enter @ token(u),
        rho=rho,
        B=lambda u: enter[:, :-1] @ write,
        C=C,
    )


def linear_attention(weights: AttentionWeights) -> InputVaryingSystem:
    """Linear attention as a running sum: A = I, state S (g p p numbers), S += v k^T.

    y_t = W_o S_{t} q_t with S_t = sum_{j <= t} v_j k_j^T, the own token included, no normalisation.
    Eigenvalue 1 with every token added for ever: the state never forgets, and never frees space.
    """
    g, p = weights.kv_heads, weights.head_width
    n = g * p * p

    def read(u: Array) -> Array:  # (h p, n): y before W_o, linear in S
        q = (weights.W_q @ u).reshape(weights.heads, p)
        share = weights.heads // g
        R = np.zeros((weights.heads, p, g, p, p))
        for head in range(weights.heads):
            R[head, :, head // share] = np.einsum("ij,k->ijk", np.eye(p), q[head])
        return R.reshape(weights.heads * p, n)

    def b(u: Array) -> Array:
        k, v = ((W @ u).reshape(g, p) for W in (weights.W_k, weights.W_v))
        return np.einsum("gi,gj->gij", v, k).reshape(n)

    def B(u: Array) -> Array:  # slope of the quadratic b(u) = v(u) k(u)^T
        k, v = ((W @ u).reshape(g, p) for W in (weights.W_k, weights.W_v))
        W_k, W_v = (W.reshape(g, p, -1) for W in (weights.W_k, weights.W_v))
        slope = np.einsum("gid,gj->gijd", W_v, k) + np.einsum("gi,gjd->gijd", v, W_k)
        return slope.reshape(n, -1)

    return InputVaryingSystem(
        n=n,
        A=lambda u: np.eye(n),
        b=b,
        rho=lambda u, x: weights.W_o @ read(u) @ (x + b(u)),
        B=B,
        C=lambda u, x: weights.W_o @ read(u),
    )


def linear_attention_fir(weights: AttentionWeights, length: int) -> InputVaryingSystem:
    """Linear attention as an FIR system: a register of the last ``length - 1`` products v k^T.

    Exact for texts of at most ``length`` tokens; its state grows with the text it must serve. For
    longer texts it is linear attention over a window of ``length`` tokens, exactly. Nilpotent.

    Raises
    ------
    ValueError
        If length < 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1; got {length}")
    sum_form = linear_attention(weights)
    past, s = length - 1, sum_form.n
    A = up_shift(past, np.eye(s))
    enter = np.zeros((past * s, s))
    if past:
        enter[-s:] = np.eye(s)
    total = np.tile(np.eye(s), (1, past)) if past else np.zeros((s, 0))
    return InputVaryingSystem(
        n=past * s,
        A=lambda u: A,
        b=lambda u: enter @ sum_form.b(u),
        rho=lambda u, x: sum_form.rho(u, total @ x),
        B=lambda u: enter @ sum_form.B(u),
        C=lambda u, x: sum_form.C(u, total @ x) @ total,
    )


def windowed_linear_attention(weights: AttentionWeights, window: int) -> InputVaryingSystem:
    """Linear attention over a window, as a sliding sum: add the new product, subtract the oldest.

        x = (S, o_1, ..., o_N),  N = window - 1,  o_j = vec(v k^T), oldest first
        S_{t+1} = S_t + o(u_t) - o_1            the sum of the register, kept up to date

    The same map as `linear_attention_fir` with ``length=window``, at two additions a step
    instead of N; but S repeats what the register holds, so the eigenvalue 1 of A is unreachable:
    whatever error enters S (rounding, a wrong x0) stays for ever. The register alone is nilpotent.

    Raises
    ------
    ValueError
        If window < 2: a window of the token alone has no state.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2; got {window}")
    sum_form = linear_attention(weights)
    past, s = window - 1, sum_form.n
    A = np.zeros(((past + 1) * s,) * 2)
    A[:s, :s] = np.eye(s)
    A[:s, s : 2 * s] = -np.eye(s)
    A[s:, s:] = up_shift(past, np.eye(s))
    enter = np.zeros(((past + 1) * s, s))
    enter[:s] += np.eye(s)
    enter[-s:] += np.eye(s)
    pick = np.eye(s, (past + 1) * s)
    return InputVaryingSystem(
        n=(past + 1) * s,
        A=lambda u: A,
        b=lambda u: enter @ sum_form.b(u),
        rho=lambda u, x: sum_form.rho(u, pick @ x),
        B=lambda u: enter @ sum_form.B(u),
        C=lambda u, x: sum_form.C(u, pick @ x) @ pick,
    )
