"""What the subspace methods share: data compressed to a triangle, and states read off it.

Stack 2i consecutive samples of inputs and outputs as columns, the past over the future,

    U_f, W_p = [U_p; Y_p], Y_f       i = block rows, one column for each of N = T - 2i + 1 times

and factor [U_f; W_p; Y_f] = L Q with Q orthonormal and L lower triangular. N is never seen again:

            U_f   W_p   Y_f
    U_f  [  L11              ]     projection of Y_f on [U_f; W_p]        [L31 L32]
    W_p  [  L21   L22        ]     the part that U_f does not explain           L32
    Y_f  [  L31   L32   L33  ]     what the past cannot predict                      L33

For data of a system of order n the past acts on the future through n numbers, the state:
rank L32 = n, and its left factor is the observability matrix Gamma = [C; C A; ..; C A^{i-1}].
The three classical methods weight that rank-n approximation differently (Van Overschee and De
Moor's theorem 12):

    N4SID   L32 L22^{-1} W_p            all the past's effect on the future, as it stands
    MOESP   L32                         after projecting away the future inputs
    CVA     (Y Y')^{-1/2} L32,  Y = [L32 L33]      in units of what is to be predicted: its singular
                                        values are the canonical correlations of past and future

Glossary
    y (T, p), u (T, m)  data                     z = [u y], q = m + p channels
    i                   block rows               L (2 i q, 2 i q)   triangular factor / sqrt(N)
    Gamma (i p, n)      observability matrix     X (n, .)           states, in coordinates of Q

Source: Van Overschee and De Moor, Subspace Identification for Linear Systems (1996), chapters 2-4;
Verhaegen and Verdult, Filtering and System Identification (2007), chapter 9.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from realization.systems import Array, as_real_array, positive_integer

WELL_CONDITIONED = 1e-4  # reciprocal condition of L above which Cholesky keeps over 8 digits of it
EXCITED = 1e-9  # relative size of the smallest direction of the inputs that counts as excited
COINCIDENT = 1e-13  # relative size of a direction of the past that future inputs leave nothing of


@dataclass(frozen=True, eq=False)
class CompressedData:
    """The factor L of the data, with its sizes: p outputs, m inputs, i block rows, N columns."""

    L: Array
    p: int
    m: int
    i: int
    N: int

    @property
    def inputs(self) -> int:
        """Rows of U_f."""
        return self.i * self.m

    @property
    def regressors(self) -> int:
        """Rows of U_f and W_p together."""
        return self.i * (2 * self.m + self.p)

    @property
    def L32(self) -> Array:
        """Effect of the past on the future beyond the future inputs, shape (i p, i (m + p))."""
        return self.L[self.regressors :, self.inputs : self.regressors]

    @property
    def L33(self) -> Array:
        """What neither past nor inputs explain of the future, shape (i p, i p)."""
        return self.L[self.regressors :, self.regressors :]


# --- compression ----------------------------------------------------------------------------------


def compress(y: Array, u: Array | None, i: int) -> CompressedData:
    """L of [U_f; U_p; Y_p; Y_f] = L Q, divided by sqrt(N).

    Raises
    ------
    ValueError
        If the record is too short for i block rows, or the inputs are not persistently exciting (of
        order 2 i, and, as far as data without noise show it, of order 2 i + n).
    """
    T, p = y.shape
    z = y if u is None else np.hstack([u, y])
    q = z.shape[1]
    m, N = q - p, T - 2 * i + 1
    if 2 * i * q > N:
        raise ValueError(
            f"y must have at least {2 * i * (q + 1) - 1} rows for block_rows={i} and {q} channels "
            f"(inputs and outputs), got {T}"
        )
    rows = _row_order(i, m, p)
    gram = hankel_gram(z, 2 * i)[np.ix_(rows, rows)]
    L = _cholesky_if_accurate(gram)
    if L is None:
        windows = np.lib.stride_tricks.sliding_window_view(z, 2 * i, axis=0)  # (N, q, 2 i)
        H = windows.transpose(0, 2, 1).reshape(N, -1)[:, rows]
        L = np.linalg.qr(H, mode="r").T
    data = CompressedData(L / np.sqrt(N), p, m, i, N)
    _check_excitation(data)
    return data


def hankel_gram(z: Array, depth: int) -> Array:
    """H H' for the block Hankel matrix H of z with `depth` block rows, without forming H.

    The block (a+1, b+1) differs from (a, b) by the terms at the two ends of the record, so only
    the first block row costs a pass over the data.
    """
    T, q = z.shape
    N = T - depth + 1
    head, tail = z[: depth - 1], z[N:]
    G = np.empty((depth, depth, q, q))
    G[0] = [z[:N].T @ z[b : b + N] for b in range(depth)]
    for a in range(depth - 1):
        G[a + 1, 0] = G[0, a + 1].T
        G[a + 1, 1:] = (
            G[a, :-1]
            - head[a][None, :, None] * head[:, None, :]
            + tail[a][None, :, None] * tail[:, None, :]
        )
    return G.transpose(0, 2, 1, 3).reshape(depth * q, depth * q)


def _row_order(i: int, m: int, p: int) -> NDArray[np.int64]:
    """Indices of [U_f; U_p; Y_p; Y_f] in rows ordered by time, and by channel within a time."""
    index = np.arange(2 * i * (m + p)).reshape(2 * i, m + p)
    blocks = (index[i:, :m], index[:i, :m], index[:i, m:], index[i:, m:])
    return np.concatenate([block.ravel() for block in blocks])


def _cholesky_if_accurate(gram: Array) -> Array | None:
    """Cholesky factor, or None where squaring the data has cost too many digits."""
    scale = np.sqrt(np.diag(gram))
    if scale.min() == 0:
        return None
    try:
        L = np.linalg.cholesky(gram / np.outer(scale, scale))
    except np.linalg.LinAlgError:
        return None
    diagonal = np.diag(L)
    return L * scale[:, None] if diagonal.min() > WELL_CONDITIONED * diagonal.max() else None


def _check_excitation(data: CompressedData) -> None:
    """Order 2 i is necessary, and 2 i + n enough: [U_p; U_f; X] has then full row rank (Willems).

    Between the two, data without noise can hide it: some combination of the past is one of future
    inputs, and what it does to the future can be credited to either.
    """
    size = 2 * data.i * data.m
    if not size:
        return
    values = np.linalg.svd(_unit_rows(data.L[:size, :size]), compute_uv=False)
    rank = int(np.sum(values > EXCITED * values[0])) if values[0] > 0 else 0
    if rank < size:
        raise ValueError(
            f"u must be persistently exciting of order {2 * data.i} (twice block_rows={data.i}): "
            f"its Hankel matrix has rank {rank} of {size}. Use a richer input or fewer block rows"
        )
    past = _unit_rows(data.L[data.inputs : data.regressors, : data.regressors])
    values = np.linalg.svd(past, compute_uv=False)
    rank = int(np.sum(values > EXCITED * values[0]))
    own = np.linalg.svd(past[:, data.inputs :], compute_uv=False)  # what U_f does not explain
    if own[rank - 1] <= COINCIDENT * own[0]:
        raise ValueError(
            f"u must be persistently exciting of order {2 * data.i} + n for a system of order n "
            f"(block_rows={data.i}): some combination of past inputs and outputs is one of future "
            "inputs. Use a richer input or fewer block rows"
        )


def _unit_rows(rows: Array) -> Array:
    """Each row divided by its length, where it has one."""
    scale = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(scale > 0, scale, 1)


# --- the three weightings -------------------------------------------------------------------------


def n4sid_observability(data: CompressedData, n: int) -> Array:
    """Gamma from the effect of the past, O = L32 L22^{-1} W_p; shape (i p, n)."""
    a, b = data.inputs, data.regressors
    O = past_effect(data) @ data.L[a:b, :b]
    return _leading_factor(O, n)


def moesp_observability(data: CompressedData, n: int) -> Array:
    """Gamma from L32; shape (i p, n)."""
    return _leading_factor(data.L32, n)


def canonical_variates(data: CompressedData, n: int) -> Array:
    """J with x = J W_p, the n combinations of the past most correlated with the future.

    (Y Y')^{-1/2} L32 = U S V' gives J = S^{1/2} V' L22^{-1}, shape (n, i (m + p)). The same states
    as Gamma^+ O only where the rank is exact: with noise, an unweighted Gamma^+ lets what is hard
    to predict into the state.
    """
    a, b = data.inputs, data.regressors
    _, values, V = np.linalg.svd(_canonical(data)[1], full_matrices=False)
    J = np.linalg.lstsq(data.L[a:b, a:b].T, V[:n].T, rcond=1e-10)[0].T
    return np.sqrt(values[:n])[:, None] * J


def past_effect(data: CompressedData) -> Array:
    """L32 L22^{-1}, shape (i p, i (m + p)): minimum norm where the past is redundant."""
    a, b = data.inputs, data.regressors
    return np.linalg.lstsq(data.L[a:b, a:b].T, data.L32.T, rcond=1e-10)[0].T


def canonical_correlations(data: CompressedData) -> Array:
    """Correlations between past and future given the future inputs, shape (i p,), descending."""
    values = np.clip(np.linalg.svd(_canonical(data)[1], compute_uv=False), 0.0, 1.0)
    return np.pad(values, (0, data.i * data.p - values.size))  # 0 where the future is redundant


def _canonical(data: CompressedData) -> tuple[Array, Array]:
    """(root, root^+ L32) with root root' = [L32 L33] [L32 L33]', pseudo-inverted if singular."""
    vectors, values, _ = np.linalg.svd(
        data.L[data.regressors :, data.inputs :], full_matrices=False
    )
    keep = values > 1e-9 * values[0]
    root = vectors[:, keep] * values[keep]
    return root, (vectors[:, keep] / values[keep]).T @ data.L32


def _leading_factor(M: Array, n: int) -> Array:
    vectors, values, _ = np.linalg.svd(M, full_matrices=False)
    return vectors[:, :n] * np.sqrt(values[:n])


# --- order ----------------------------------------------------------------------------------------


def select_order(correlations: ArrayLike, N: int, p: int, m: int = 0) -> int:
    """Order n with the smallest -N log(1 - r_{n+1}^2) + log(N) n (2 p + m).

    Parameters
    ----------
    correlations : array_like, shape (k,)
        Canonical correlations r_1 >= r_2 >= .. between past and future.
    N : int
        Number of columns they were estimated from.
    p, m : int
        Numbers of outputs and inputs; a model of order n has n (2 p + m) parameters besides D.

    Returns
    -------
    int
        At least 1 and at most k - 1.

    Raises
    ------
    ValueError
        If there are fewer than two correlations, or they are not finite.

    Notes
    -----
    The first term is what the best state left out would have told, in nats; the second is Schwarz's
    penalty. It is the singular-value criterion of Bauer, Order estimation for subspace methods
    (2001), which is consistent, with r^2 replaced by -log(1 - r^2).
    """
    r = np.clip(as_real_array("correlations", correlations, 1), 0.0, 1 - 1e-12)
    if r.size < 2:
        raise ValueError(f"correlations must have at least 2 entries, got {r.size}")
    orders = np.arange(1, r.size)
    left_out = -N * np.log1p(-(r[1:] ** 2))
    return int(orders[np.argmin(left_out + np.log(N) * orders * (2 * p + m))])


def default_block_rows(T: int, p: int, m: int, order: int | None) -> int:
    """Block rows that leave room for the order and, where T allows, for slow dynamics.

    About 1.5 order / p + 5, at least 10, and few enough for the record; 15 when no order is given.
    """
    wanted = 15 if order is None else max(10, int(np.ceil(1.5 * order / p)) + 5)
    longest = (T + 1) // (2 * (p + m + 1))
    needed = 2 if order is None else -(-order // p) + 1
    return max(needed, min(wanted, longest))


def checked_sizes(T: int, p: int, order: int | None, block_rows: int) -> None:
    """ValueError unless 1 <= order <= p (block_rows - 1) and block_rows >= 2."""
    if positive_integer("block_rows", block_rows) < 2:
        raise ValueError(f"block_rows must be at least 2, got {block_rows}")
    if order is not None and positive_integer("order", order) > p * (block_rows - 1):
        raise ValueError(
            f"order must be at most p (block_rows - 1) = {p * (block_rows - 1)}, got {order}"
        )
