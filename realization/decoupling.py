"""Splitting A by its spectrum, as far as rounding errors allow.

    A = sum_i V_i A_i L_i,     L_i V_j = I if i = j else 0,     L_i A = A_i L_i,  A V_i = V_i A_i

Two groups of eigenvalues are split by the solution X of the Sylvester equation

    S11 X - X S22 = -S12,    [I X; 0 I]^{-1} [S11 S12; 0 S22] [I X; 0 I] = [S11 0; 0 S22]

applied to a real Schur form S. A rounding error in A of relative size eps turns the split space by
about eps ||A|| (1 + ||X||) / gap. Where that angle is not small, the eigenvalues are one eigenvalue
to working precision (a Jordan block, or equal modes), and they stay together in a triangular A_i.

Both hold in any units of the states, so the choice is free: `in_natural_units` makes what drives a
state as large as what it drives, and the rounding errors of other states then do no harm to it.

Once the modes are apart, reachability is a question to each of them alone (Popov, Belevitch,
Hautus): (A, B) is reachable if and only if every (A_i, L_i B) is. The rounding error of L_i B is
known, which gives the decision a threshold that is neither a guess nor a knob.

Glossary
    A (n, n)      L_i (k_i, n) left basis, rows      V_i (n, k_i) right basis, columns
    S, Q          real Schur form, A = Q S Q^T       A_i (k_i, k_i) quasi-triangular block

Source: Bavely and Stewart, SIAM J. Numer. Anal. 16 (1979); Stewart and Sun, Matrix Perturbation
Theory (1990), chapter V; Kailath, Linear Systems (1980), section 2.4.3; Osborne, J. ACM 7 (1960)
and James, Langou and Lowery (2014), arXiv:1401.5766, for the units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack, schur, solve_sylvester

from realization.systems import Array, StateSpace, reachability_matrix

EPS = float(np.finfo(np.float64).eps)
# Relative perturbation of (A, B, C) that counts as rounding: some hundred units in the last place,
# because a change of basis leaves its condition number of units behind.
ROUNDING = 1e-13
# A split is kept while a rounding error turns the split space by less than about this angle.
LARGEST_ANGLE = 1e-4
LARGEST_NUMBER_OF_SWEEPS = 100  # of `in_natural_units`; each halves what is left, in digits


class IllConditionedWarning(UserWarning):
    """A result is right in principle, and has lost digits to the basis that was asked for."""


def in_natural_units(sys: StateSpace) -> tuple[StateSpace, Array]:
    """The system in units of its own, and those units: x = d * (the states of the result).

    Units d divide row i of [A B] by d_i and multiply column i of [A; C] by it. They are powers of
    2, which change no digit, and make the norms of the two, r_i and c_i, equal up to a factor of 2.

    Parameters
    ----------
    sys : StateSpace

    Returns
    -------
    scaled : StateSpace
        sys.transform(diag(1 / d)), without rounding errors.
    d : ndarray, shape (n,)
        One result for one system: in other units of the states, d changes as they do (by a factor
        of 2 more or less).
    """
    A, b, c = np.abs(sys.A), np.linalg.norm(sys.B, axis=1), np.linalg.norm(sys.C, axis=0)
    # Of a state the diagonal entry knows no units; 1, the step from x_t to x_{t+1}, stands for it.
    # Couplings far below 1, rounding errors above all, then count for nothing.
    np.fill_diagonal(A, 1.0)
    # Units of inputs and outputs: with those of the Markov parameters in the middle between them.
    gain = np.sqrt(_largest_gain(sys))
    b, c = b / gain, c / gain
    exponent = np.zeros(sys.n)
    for _ in range(LARGEST_NUMBER_OF_SWEEPS):
        settled = True
        for i in range(sys.n):
            r, s = np.hypot(np.linalg.norm(A[i]), b[i]), np.hypot(np.linalg.norm(A[:, i]), c[i])
            k = round(np.log2(r / s) / 2)
            if k:
                A[i], b[i] = A[i] / 2.0**k, b[i] / 2.0**k
                A[:, i], c[i] = A[:, i] * 2.0**k, c[i] * 2.0**k
                exponent[i], settled = exponent[i] + k, False
        if settled:
            break
    d = 2.0**exponent
    return StateSpace(sys.A / d[:, None] * d, sys.B / d[:, None], sys.C * d, sys.D), d


def _largest_gain(sys: StateSpace) -> float:
    """Largest Markov parameter M_1 .. M_n, growth apart: the same in all units of the states."""
    R = reachability_matrix(sys.A / max(1.0, sys.spectral_radius), sys.B, max(sys.n, 1))
    return float(np.abs(sys.C @ R).max(initial=0.0)) or 1.0


@dataclass(frozen=True)
class Block:
    """One group of eigenvalues that rounding does not tell apart.

    Attributes
    ----------
    A : ndarray, shape (k, k)
        Real Schur block.
    L : ndarray, shape (k, n)
        Left basis, L A = A_i L.
    V : ndarray, shape (n, k)
        Right basis, A V = V A_i, with L V = I.
    poles : ndarray of complex, shape (k,)
        Its eigenvalues.
    """

    A: Array
    L: Array
    V: Array
    poles: NDArray[np.complex128]

    @property
    def size(self) -> int:
        """Number of states k."""
        return self.A.shape[0]

    def dual(self) -> Block:
        """The same poles in A^T, with left basis V^T; `A` stays, only its sep is ever used."""
        return Block(self.A, self.V.T, self.L.T, self.poles)

    @property
    def is_complex(self) -> bool:
        """True for a single complex pair, False also for one that rounding may have torn apart."""
        return self.size == 2 and bool(is_pair(self.A)[0])


def is_pair(A: Array) -> NDArray[np.bool_]:
    """For each place on the diagonal of a real Schur block: does a genuine complex pair start here?

    A Jordan block comes out of the Schur form as a pair with an entry of the size of rounding
    errors below the diagonal.
    """
    smaller = np.minimum(np.abs(np.diag(A, -1)), np.abs(np.diag(A, 1)))
    return smaller > EPS / LARGEST_ANGLE * np.linalg.norm(A)


def attempts(A: Array, tol: float) -> list[tuple[list[Block], float]]:
    """Splits of A, each with a perturbation that counts as zero, most willing to drop first.

    The last is all eigenvalues in one group: it needs no eigenvalue to be right.
    """
    split, identity = decouple(A), np.eye(len(A))
    whole = [Block(A, identity, identity, np.linalg.eigvals(A).astype(np.complex128))]
    return [*((split, tol * 10.0**-k) for k in range(4)), (whole, tol / 100)]


def decouple(A: Array) -> list[Block]:
    """Split A into the finest blocks that rounding errors allow.

    Parameters
    ----------
    A : ndarray, shape (n, n)

    Returns
    -------
    list of Block
        One block per real eigenvalue or complex pair; larger ones where eigenvalues (nearly)
        coincide.
    """
    if A.shape[0] == 0:
        return []
    return _decouple_simple(A) or _decouple_by_schur(A)


def _decouple_simple(A: Array) -> list[Block]:
    """The blocks from eigenvectors, or [] unless every eigenvalue is well apart from the others."""
    lam, V = np.linalg.eig(A)
    lam = lam.astype(np.complex128)
    try:
        W = np.linalg.inv(V)
    except np.linalg.LinAlgError:
        return []
    condition = np.linalg.norm(W, axis=1)  # of each eigenvalue, the columns of V being units
    gap = np.abs(lam[:, None] - lam[None, :])
    np.fill_diagonal(gap, np.inf)
    turned = EPS * np.linalg.norm(A) * np.maximum(condition[:, None], condition[None, :])
    if not (turned <= LARGEST_ANGLE * gap).all():
        return []
    blocks = []
    for i in np.flatnonzero(lam.imag >= 0):
        a, w = lam[i].real, lam[i].imag
        if w == 0:
            blocks.append(Block(np.array([[a]]), W[i : i + 1].real, V[:, i : i + 1].real, lam[[i]]))
        else:
            # A [Re v, Im v] = [Re v, Im v] [[a, w], [-w, a]]
            right = np.stack([V[:, i].real, V[:, i].imag], axis=1)
            left = np.stack([2 * W[i].real, -2 * W[i].imag])
            poles = np.array([lam[i], lam[i].conj()])
            blocks.append(Block(np.array([[a, w], [-w, a]]), left, right, poles))
    return blocks


def _decouple_by_schur(A: Array) -> list[Block]:
    """The blocks from a real Schur form, for any spectrum (Bavely and Stewart)."""
    n = A.shape[0]
    S, Q = schur(A)
    R = Q.copy(order="F")  # right basis: A R = R S with the finished blocks of S cut off
    lam = _quasi_triangular_eigenvalues(S)
    scale = max(float(np.linalg.norm(A)), np.finfo(float).tiny)
    blocks: list[Block] = []
    start = 0
    while start < n:
        k = _diagonal_block_size(S, start)
        while start + k < n:
            X, gap, nearest = _sylvester_split(S, lam, start, k)
            if EPS * scale * (1 + np.abs(X).max()) <= LARGEST_ANGLE * gap:
                break
            S, Q, R, moved = _bring_forward(S, Q, R, nearest, start + k)
            lam = _quasi_triangular_eigenvalues(S)
            k += moved
        own, rest = slice(start, start + k), slice(start + k, n)
        L = Q[:, own].T
        V = R[:, own].copy()
        if start + k < n:
            L = L - X @ Q[:, rest].T
            R[:, rest] += V @ X
        blocks.append(Block(S[own, own], L, V, lam[own]))
        start += k
    return blocks


def _diagonal_block_size(S: Array, i: int) -> int:
    """1 for a real eigenvalue at S[i, i], 2 for a complex pair."""
    return 2 if i + 1 < S.shape[0] and S[i + 1, i] != 0 else 1


def _quasi_triangular_eigenvalues(S: Array) -> NDArray[np.complex128]:
    """Eigenvalues in the order of the diagonal of a real Schur form."""
    lam = np.diag(S).astype(np.complex128)
    for i in np.flatnonzero(np.diag(S, -1)):
        # LAPACK's standard form: equal diagonal entries, off-diagonal entries of opposite sign.
        w = np.sqrt(complex(S[i, i + 1] * S[i + 1, i]))
        lam[i] += w
        lam[i + 1] -= w
    return lam


def _sylvester_split(
    S: Array, lam: NDArray[np.complex128], start: int, k: int
) -> tuple[Array, float, int]:
    """X that splits the k states at `start` from those after, the gap, the nearest pole there."""
    own, rest = slice(start, start + k), slice(start + k, S.shape[0])
    X, scale, _ = lapack.dtrsyl(S[own, own], S[rest, rest], -S[own, rest], isgn=-1)
    distance = np.abs(lam[own, None] - lam[None, rest]).min(axis=0)
    nearest = int(distance.argmin())
    gap = float(distance[nearest])
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        X = X / scale  # LAPACK scales X down where it would overflow
    return X, gap, rest.start + nearest


def _bring_forward(
    S: Array, Q: Array, R: Array, source: int, target: int
) -> tuple[Array, Array, Array, int]:
    """Swap the diagonal block of S at `source` up to `target`; also its size (1 or 2)."""
    if source > 0 and S[source, source - 1] != 0:
        source -= 1
    size = _diagonal_block_size(S, source)
    if source != target:
        S, Z, info = lapack.dtrexc(S, np.eye(S.shape[0]), source + 1, target + 1)
        if info == 0:
            return S, Q @ Z, R @ Z, _diagonal_block_size(S, target)
        # LAPACK refuses a swap that rounding would spoil: take all that lies between instead.
        size = source + size - target
    return S, Q, R, size


# --- which modes an input reaches -----------------------------------------------------------------


def unreachable_rows(blocks: list[Block], A: Array, B: Array, tol: float) -> list[Array]:
    """Rows w that no input reaches: a left-invariant space of A, orthogonal to B.

    Parameters
    ----------
    blocks : list of Block
        From `decouple(A)`.
    A : ndarray, shape (n, n)
    B : ndarray, shape (n, m)
    tol : float
        Relative perturbation of (A, B) that counts as zero.

    Returns
    -------
    list of ndarray, shape (unreachable in this block, n)
        For each block an orthonormal basis of its share.
    """
    if not blocks:
        return []
    noise = _reachability_noise(blocks, A, B)
    rows: dict[int, Array] = {}
    # One real eigenvalue, or one complex pair, is reached as a whole or not at all.
    for k in (1, 2):
        simple = [i for i, b in enumerate(blocks) if b.size == k and (k == 1 or b.is_complex)]
        if simple:
            L = np.stack([blocks[i].L.T for i in simple])
            U = np.linalg.qr(L)[0].transpose(0, 2, 1) if k > 1 else _unit_rows(L)
            lost = np.linalg.norm(U @ B, axis=(1, 2)) <= tol * noise[simple]
            rows.update((i, U[c] if lost[c] else U[c, :0]) for c, i in enumerate(simple))
    for i, block in enumerate(blocks):
        if i not in rows:
            rows[i] = _unreachable_within(block, A, B, noise[i], tol)
    return [rows[i] for i in range(len(blocks))]


def are_unreached(rows: list[Array], reached: Array, tol: float) -> bool:
    """True when half the digits see nothing of the `reached_states` in the space of `rows`.

    The bounds on the modes are of first order. Where eigenvalues are so ill-conditioned that the
    bounds exclude nothing, every mode would count as lost; what inputs do reach says otherwise.
    """
    U = np.linalg.qr(np.vstack(rows).T)[0].T
    sight = np.linalg.norm(U @ reached, axis=(1, 2)).max(initial=0.0)
    return bool(sight <= np.sqrt(max(tol, ROUNDING)))


def reached_states(A: Array, B: Array) -> Array:
    """B, A B, .., A^{n-1} B, shape (n, n, m), each divided by the largest norm up to it."""
    rho = max(1.0, float(np.abs(np.linalg.eigvals(A)).max()))  # keeps the powers finite
    R = np.stack(np.split(reachability_matrix(A / rho, B, len(A)), len(A), axis=1))
    size = np.maximum.accumulate(np.linalg.norm(R, axis=(1, 2)))
    return R / np.maximum(size, np.finfo(float).tiny)[:, None, None]


def _unit_rows(L: Array) -> Array:
    """Columns (r, n, 1) -> unit rows (r, 1, n)."""
    return (L / np.linalg.norm(L, axis=1, keepdims=True)).transpose(0, 2, 1)


def _reachability_noise(blocks: list[Block], A: Array, B: Array) -> Array:
    """Change of U_i B, U_i the orthonormal rows of block i, per relative change of (A, B).

    To first order the left space of block i turns by dU_i = sum_j Y_ij L_j with
    ||Y_ij|| <= ||dA|| ||V_j|| / sep(A_i, A_j), so that ||dU_i B|| <= ||dB|| + sum_j ||Y_ij L_j B||.
    """
    sizes = np.array([b.size for b in blocks])
    first = np.cumsum(sizes) - sizes
    V = np.hstack([b.V for b in blocks])
    LB = np.vstack([b.L for b in blocks]) @ B
    seen = np.sqrt(np.add.reduceat((V**2).sum(axis=0), first))
    seen *= np.sqrt(np.add.reduceat((LB**2).sum(axis=1), first))
    lam = np.concatenate([b.poles for b in blocks])
    gap = np.abs(lam[:, None] - lam[None, :])
    gap = np.minimum.reduceat(np.minimum.reduceat(gap, first, axis=0), first, axis=1)
    np.fill_diagonal(gap, 1.0)
    for i, one in enumerate(blocks):
        if one.size > 2:
            for j, two in enumerate(blocks):
                if i != j:
                    gap[i, j] = gap[j, i] = _separation(one.A, two.A)
    np.fill_diagonal(gap, np.inf)
    return np.linalg.norm(B) + np.linalg.norm(A) * (seen[None, :] / gap).sum(axis=1)


def _separation(A1: Array, A2: Array) -> float:
    """Estimate of min ||A1 Y - Y A2|| / ||Y||: non-normal blocks are closer than their poles."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(3, A1.shape[0], A2.shape[0]))
    largest = 0.0
    for right in signs:
        Y, scale, _ = lapack.dtrsyl(A1, A2, right, isgn=-1)
        largest = max(largest, np.linalg.norm(Y) / scale if scale > 0 else np.inf)
    return 1 / largest


def _unreachable_within(block: Block, A: Array, B: Array, noise: float, tol: float) -> Array:
    """The staircase inside one block: orthonormal rows (unreachable, n).

    The inputs reach range(U B), and through A_i they reach more, until a step adds nothing larger
    than what perturbations of relative size `tol` would add.
    """
    U = np.linalg.qr(block.L.T)[0].T
    Ai, coupling = U @ A @ U.T, U @ B
    spread = np.linalg.norm(Ai - np.trace(Ai) / block.size * np.eye(block.size), 2)
    projector = np.linalg.norm(block.L) * np.linalg.norm(block.V)
    threshold = tol * noise
    reached, weakest = 0, np.inf
    while reached < block.size:
        W, s, _ = np.linalg.svd(coupling)
        rank = int((s > threshold).sum())
        if rank == 0:
            break
        Z = np.eye(block.size)
        Z[reached:, reached:] = W
        U, Ai = Z.T @ U, Z.T @ Ai @ Z
        coupling = Ai[reached + rank :, reached : reached + rank]
        # A direction that was reached weakly is known badly, and hands its error on through A_i.
        weakest = min(weakest, s[rank - 1])
        threshold = tol * (np.linalg.norm(A) * projector + spread * noise / weakest)
        reached += rank
    return U[reached:]


def orthogonal_split(A: Array, rows: Array) -> tuple[Array, int]:
    """Orthogonal T whose last rows span the left-invariant `rows`: T A T^T = [A_r *; 0 A_u].

    Rows that are nearly parallel leave their span with more than rounding errors; one Newton step
    for the invariant space, [Y I] with Y A_r - A_u Y = -(the block that should be zero), removes
    them (Stewart, SIAM Review 15, 1973).

    Parameters
    ----------
    A : ndarray, shape (n, n)
    rows : ndarray, shape (u, n)
        Linearly independent, rows A = (some matrix) rows.

    Returns
    -------
    T : ndarray, shape (n, n)
    r : int
        n - u, the size of A_r.
    """
    if not len(rows):
        return np.eye(len(A)), len(A)
    T, r = _complement_first(rows)
    H = T @ A @ T.T
    if r > 0 and np.linalg.norm(H[r:, :r]) > 1e3 * EPS * np.linalg.norm(A):
        Y = solve_sylvester(-H[r:, r:], H[:r, :r], -H[r:, :r])
        # Where both parts have a pole in common the equation is singular and Y means nothing.
        if np.linalg.norm(Y) < LARGEST_ANGLE:
            T, r = _complement_first(T[r:] + Y @ T[:r])
    return T, r


def _complement_first(rows: Array) -> tuple[Array, int]:
    """Orthogonal T whose last rows span `rows`, and how many rows come before them."""
    count, n = rows.shape
    Q = np.linalg.qr(rows.T, mode="complete")[0]
    return np.vstack([Q[:, count:].T, Q[:, :count].T]), n - count
