"""From an impulse response to a state: Hankel matrices and the Ho-Kalman algorithm.

    H = [M_1  M_2  .. M_c    ]      past inputs -> future outputs, and
        [M_2  M_3  .. M_{c+1}]
        [ :    :       :     ]      H = [C; C A; ..; C A^{r-1}] [B, A B, .., A^{c-1} B] = O R
        [M_r  ..  M_{r+c-1}  ]

Everything the past does to the future goes through the n numbers of the state, so rank H = n, the
order of the minimal realization (Kronecker; Ho and Kalman). A factor O, one block row up, is O A:

    H = U S V^T,  O = U S^{1/2},  R = S^{1/2} V^T,  A = O[:-p]^+ O[p:],  B = R[:, :m],  C = O[:p]

With noise H has full rank, and the order is a choice: where the singular values fall most
(`order_by_gap`), or where a further state no longer pays for its parameters (`order_by_bic`).

Glossary
    M_k (p, m)       Markov parameters, given as markov (k, p, m) with markov[0] = D
    r, c             block rows and block columns, r + c = k
    O (r p, n)       observability matrix         S (n,)   singular values of H, descending
    R (n, c m)       reachability matrix

Source: Ho and Kalman, Regelungstechnik 14 (1966); Kung, Asilomar (1978); Juang and Pappa, J.
Guidance 8 (1985) under the name ERA; Halko, Martinsson, Tropp, SIAM Review 53 (2011) for the
randomized singular value decomposition.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike
from scipy.fft import irfft, next_fast_len, rfft

from realization.decoupling import EPS, IllConditionedWarning
from realization.systems import Array, StateSpace, as_real_array, positive_integer

# Above this number of entries only the leading singular vectors are computed.
LARGEST_FULL_SVD = 150 * 150


def _check_markov(markov: ArrayLike) -> Array:
    markov = as_real_array("markov", markov, 3)
    if min(markov.shape) < 1:
        raise ValueError(f"markov must have shape (k, p, m) without zeros, got {markov.shape}")
    return markov


def block_hankel(markov: ArrayLike, rows: int, cols: int) -> Array:
    """Block Hankel matrix with blocks M_{i+j+1}, i < rows, j < cols (M_0 = D does not enter).

    Parameters
    ----------
    markov : array_like, shape (k, p, m)
        Markov parameters M_0 .. M_{k-1}, k >= rows + cols.
    rows, cols : int
        Block rows and block columns.

    Returns
    -------
    ndarray, shape (rows * p, cols * m)

    Raises
    ------
    ValueError
        If there are too few Markov parameters.
    """
    markov = _check_markov(markov)
    rows, cols = positive_integer("rows", rows), positive_integer("cols", cols)
    k, p, m = markov.shape
    if k < rows + cols:
        raise ValueError(f"markov must hold rows + cols = {rows + cols} parameters, got {k}")
    windows = np.lib.stride_tricks.sliding_window_view(markov[1 : rows + cols], cols, axis=0)
    return windows.transpose(0, 1, 3, 2).reshape(rows * p, cols * m)


# --- the algorithm --------------------------------------------------------------------------------


def ho_kalman(markov: ArrayLike, order: int | None = None, *, seed: int = 0) -> StateSpace:
    """Realize an impulse response: Ho-Kalman in Kung's balanced form (known as ERA).

    Parameters
    ----------
    markov : array_like, shape (k, p, m)
        Markov parameters M_0 .. M_{k-1}, markov[0] = D, k >= 3 unless only D is given. For exact
        data of order n, k = 2 n + 1 suffices, and k = 2 n + 2 when the order is to be found.
    order : int, optional
        States of the result. Left out: the rank of the Hankel matrix when it is singular to
        working precision (data without noise), else the choice of `order_by_bic`.
    seed : int
        Seed of the randomized singular value decomposition that large matrices get.

    Returns
    -------
    StateSpace
        Nearly balanced: the Gramians over the horizon of the data are equal and diagonal.

    Raises
    ------
    ValueError
        If markov is not of shape (k, p, m), or the order needs more Markov parameters.

    Warns
    -----
    IllConditionedWarning
        When `order` is above the numerical rank: the states beyond it realize rounding errors.
    """
    markov = _check_markov(markov)
    k, p, m = markov.shape
    rows, cols = _shape(k)
    largest = max(0, min((rows - 1) * p, cols * m))
    if order is not None and not (
        isinstance(order, (int, np.integer))
        and not isinstance(order, bool)
        and 0 <= order <= largest
    ):
        raise ValueError(
            f"order must be an integer in 0 .. {largest} (markov has k={k}, p={p}, m={m}), "
            f"got {order!r}"
        )
    if largest == 0 or order == 0 or not markov[1:].any():
        return StateSpace(np.zeros((0, 0)), np.zeros((0, m)), np.zeros((p, 0)), markov[0])
    U, s, Vt = leading_svd(markov, rows, cols, order, seed)
    rank = numerical_rank(s, max(rows * p, cols * m))
    if order is None:
        exact = rank < min(rows * p, cols * m)
        order = min(rank, largest) if exact else _bic(markov, U, s, Vt)
    elif order > rank:
        warnings.warn(
            f"ho_kalman: order {order} is above the numerical rank {rank} of the Hankel matrix; "
            "the further states realize rounding errors",
            IllConditionedWarning,
            stacklevel=2,
        )
    U = U[:, :order]
    return _realize(U, s[:order], Vt, _shift_factors(U, p), markov[0])


def _shape(k: int) -> tuple[int, int]:
    """Block rows and columns of the squarest Hankel matrix that uses M_1 .. M_{k-1}."""
    return (k + 1) // 2, k // 2


def numerical_rank(s: Array, size: int) -> int:
    """How many singular values rise above the rounding errors of a matrix of that size."""
    return int((s > size * EPS * s[0]).sum())


def _shift_factors(U: Array, p: int) -> tuple[Array, Array]:
    """R, E with shift_n = R[:n, :n]^{-1} E[:n, :n], the least-squares solution of

        U[:-p, :n] shift_n = U[p:, :n]

    for every order n at once: leading columns have leading factors.
    """
    Q, R = np.linalg.qr(U[:-p])
    return R, Q.T @ U[p:]


def _realize(U: Array, s: Array, Vt: Array, factors: tuple[Array, Array], D: Array) -> StateSpace:
    """A from the shift of O = U S^{1/2}, B and C from the first blocks of R and O; n = len(s)."""
    (p, m), n = D.shape, len(s)
    R, E = factors
    # The shift of U is solved for before scaling: U is well conditioned, O need not be.
    shift = np.linalg.lstsq(R[:n, :n], E[:n, :n], rcond=None)[0]
    root = np.sqrt(s)
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    A = inverse[:, None] * shift * root
    return StateSpace(A, root[:, None] * Vt[:n, :m], U[:p, :n] * root, D)


# --- leading singular vectors ---------------------------------------------------------------------


def leading_svd(
    markov: Array, rows: int, cols: int, order: int | None, seed: int
) -> tuple[Array, Array, Array]:
    """Leading singular triplets of the block Hankel matrix, exact to working precision.

    Small matrices: the full decomposition. Large ones: a random block, its products by FFT, and
    block Krylov steps [Q, H^T H Q] until the residuals ||H v - s u|| certify what is needed; the
    full decomposition when that would take a quarter of all directions (noise without a gap).

    Parameters
    ----------
    markov : ndarray, shape (k, p, m)
    rows, cols : int
        Block rows and columns.
    order : int or None
        How many triplets are needed; None asks for all above the numerical rank.
    seed : int

    Returns
    -------
    U, s, Vt : ndarray, shapes (rows p, l), (l,), (l, cols m)
        l >= order, descending.
    """
    _, p, m = markov.shape
    height, width = rows * p, cols * m
    block = 32 if order is None else order + 12
    if height * width > LARGEST_FULL_SVD:
        multiply, multiply_transposed = _fast_products(markov, rows, cols)
        Q = np.random.default_rng(seed).standard_normal((width, block))
        while 4 * Q.shape[1] <= min(height, width):
            Y = np.linalg.qr(multiply(Q))[0]
            Z = multiply_transposed(Y)
            W, s, Xt = np.linalg.svd(Z.T, full_matrices=False)
            U = Y @ W
            residual = np.linalg.norm(multiply(Xt.T) - U * s, axis=0)
            floor = max(height, width) * EPS * s[0]
            enough = s[-1] <= floor if order is None else True
            if enough and (residual[:order] <= floor).all():
                return U, s, Xt
            Q = np.linalg.qr(np.hstack([Q, Z]))[0]
    return np.linalg.svd(block_hankel(markov, rows, cols), full_matrices=False)


def _fast_products(markov: Array, rows: int, cols: int):
    """X -> H X and Y -> H^T Y through the FFT: a Hankel matrix is a convolution, reversed."""
    _, p, m = markov.shape
    length = next_fast_len(rows + cols - 1, real=True)
    spectrum = rfft(markov[1 : rows + cols], length, axis=0)  # (f, p, m)

    def multiply(X: Array) -> Array:
        """(cols m, l) -> (rows p, l): sum_j M_{i+j+1} x_j is a convolution with x reversed."""
        x = X.reshape(cols, m, -1)[::-1]
        y = irfft(spectrum @ rfft(x, length, axis=0), length, axis=0)
        return y[cols - 1 : cols - 1 + rows].reshape(rows * p, -1)

    def multiply_transposed(Y: Array) -> Array:
        """(rows p, l) -> (cols m, l)."""
        y = Y.reshape(rows, p, -1)[::-1]
        x = irfft(spectrum.transpose(0, 2, 1) @ rfft(y, length, axis=0), length, axis=0)
        return x[rows - 1 : rows - 1 + cols].reshape(cols * m, -1)

    return multiply, multiply_transposed


# --- order selection ------------------------------------------------------------------------------


def order_by_gap(singular_values: ArrayLike) -> int:
    """The order after which the singular values fall by the largest factor.

    Parameters
    ----------
    singular_values : array_like, shape (k,)
        Descending, as numpy.linalg.svd gives them; values below rounding errors count as such.

    Returns
    -------
    int
        Between 0 (all zero) and k.

    Raises
    ------
    ValueError
        If the values are negative, not descending, or there are none.
    """
    s = as_real_array("singular_values", singular_values, 1)
    if s.size == 0 or (s < 0).any() or (np.diff(s) > 0).any():
        raise ValueError(f"singular_values must be descending and >= 0, got {s!r:.80}")
    if s[0] == 0:
        return 0
    floor = s.size * EPS * s[0]
    s = np.maximum(np.append(s, floor if s[-1] <= floor else s[-1]), floor)
    return int((s[:-1] / s[1:]).argmax()) + 1


def order_by_bic(markov: ArrayLike, *, seed: int = 0) -> int:
    """The order that minimises N log(mean squared residual) + d(n) log N, d(n) = n (p + m).

    The residual is that of the balanced model of order n on the N = (k - 1) p m numbers given,
    and d(n) counts the invariants of such a model. For Markov parameters with white errors.

    Parameters
    ----------
    markov : array_like, shape (k, p, m)
    seed : int
        Seed of the randomized singular value decomposition that large matrices get.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If markov is not of shape (k, p, m) with k >= 3.
    """
    markov = _check_markov(markov)
    k = len(markov)
    if k < 3:
        raise ValueError(f"markov must hold at least 3 parameters, got {k}")
    rows, cols = _shape(k)
    U, s, Vt = leading_svd(markov, rows, cols, None, seed)
    return _bic(markov, U, s, Vt)


def _bic(markov: Array, U: Array, s: Array, Vt: Array) -> int:
    """The minimiser over orders up to a third of the equations."""
    k, p, m = markov.shape
    N = (k - 1) * p * m
    largest = min(len(s), max(1, N // (3 * (p + m))), max(1, U.shape[0] // 2), 64)
    # A residual at the level of rounding errors is zero; log(0) must not buy further states.
    floor = (EPS * np.abs(markov).max()) ** 2 * N
    factors = _shift_factors(U[:, :largest], p)
    best, best_score = 0, N * np.log(max((markov[1:] ** 2).sum(), floor) / N)
    for n in range(1, largest + 1):
        error = markov - _realize(U, s[:n], Vt, factors, markov[0]).markov(k)
        score = N * np.log(max((error**2).sum(), floor) / N) + n * (p + m) * np.log(N)
        if np.isfinite(score) and score < best_score:
            best, best_score = n, score
    return best
