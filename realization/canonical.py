"""Canonical forms: the bases in which a system shows one of its sides.

    x' = T x,    (A, B, C, D) -> (T A T^{-1}, T B, C T^{-1}, D)

controllable  identities above the diagonal, one full row a chain: the state is a stretch of input
observable    its dual: the state is what the outputs will be
modal         real and block diagonal: each block one pole, or one complex pair
balanced      both Gramians equal and diagonal: states ranked by what they carry
staircase     orthogonal T, inputs reach the states block by block; what they never reach is last

Each form returns (system, T) with sys.transform(T) = system.

Glossary
    T (n, n)    change of basis                  mu_j    length of the chain b_j, A b_j, ..
    q_i (n,)    row that starts chain i of T     M, U    M = [A^k b_j] = V U, U triangular

Source: Luenberger, IEEE TAC 12 (1967); Kailath, Linear Systems (1980), chapter 6; Van Dooren,
IEEE TAC 26 (1981) for the staircase; Moore, IEEE TAC 26 (1981) for balancing.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from realization.decoupling import (
    EPS,
    ROUNDING,
    Block,
    IllConditionedWarning,
    are_unreached,
    attempts,
    decouple,
    in_natural_units,
    is_pair,
    orthogonal_split,
    reached_states,
    unreachable_rows,
)
from realization.reduction import balancing_projection, gramian_factor, require_stable
from realization.systems import Array, StateSpace

LARGEST_CONDITION = 1e8


def _warn_if_ill_conditioned(form: str, T: Array) -> None:
    condition = np.linalg.cond(T) if T.size else 1.0
    if not condition <= LARGEST_CONDITION:
        warnings.warn(
            f"{form}: the change of basis has condition number {condition:.1e}, so up to "
            f"{min(16.0, np.log10(condition)):.0f} of 16 digits are lost; balanced_form, "
            "modal_form and staircase_form are better conditioned",
            IllConditionedWarning,
            stacklevel=3,
        )


# --- controllable and observable forms ------------------------------------------------------------


def controllable_form(sys: StateSpace) -> tuple[StateSpace, Array]:
    """Controllable canonical form along the Kronecker indices of (A, B).

    Chain i has mu_i states, ones above the diagonal and one full last row; its input enters at its
    last state. For one input A is the companion matrix, with minus the coefficients of the
    characteristic polynomial in its last row, constant term first, and B = [0 .. 0 1]^T.

    Parameters
    ----------
    sys : StateSpace
        Reachable, n >= 1.

    Returns
    -------
    system : StateSpace
    T : ndarray, shape (n, n)
        sys.transform(T) = system. np.linalg.cond(T) tells what the form costs.

    Raises
    ------
    ValueError
        If some modes are not reached by any input.

    Warns
    -----
    IllConditionedWarning
        When the condition number of T is above 1e8.
    """
    form, T = _controllable(sys, "reachable", "input")
    _warn_if_ill_conditioned("controllable_form", T)
    return form, T


def observable_form(sys: StateSpace) -> tuple[StateSpace, Array]:
    """Observable canonical form: the transpose of the controllable form of the dual system.

    Parameters
    ----------
    sys : StateSpace
        Observable, n >= 1.

    Returns
    -------
    system : StateSpace
        For one output A has ones below the diagonal, minus the coefficients of the characteristic
        polynomial in its last column, constant term first, and C = [0 .. 0 1].
    T : ndarray, shape (n, n)
        sys.transform(T) = system.

    Raises
    ------
    ValueError
        If some modes are not seen by any output.

    Warns
    -----
    IllConditionedWarning
        When the condition number of T is above 1e8.
    """
    form, T = _controllable(sys.dual(), "observable", "output")
    T = np.linalg.inv(T).T
    _warn_if_ill_conditioned("observable_form", T)
    return form.dual(), T


def _controllable(sys: StateSpace, property_name: str, port: str) -> tuple[StateSpace, Array]:
    """Luenberger's form: T = [q_i A^k], with q_i A^k b_j = 1 only for j = i, k = mu_i - 1."""
    n = sys.n
    lost = len(_unreachable(sys)) if n else 0
    if n == 0 or lost:
        raise ValueError(
            f"sys must be {property_name} with n >= 1: {lost} of {n} modes see no {port}; "
            "minimal(sys) removes them"
        )
    sys, d = in_natural_units(sys)
    V, H, chains = _krylov_basis(sys.A, sys.B)
    # M = V U in the order in which the vectors A^k b_j were taken.
    U = np.zeros((n, n))
    taken: list[int] = []
    for column, j in enumerate(chains):
        earlier = [c for c in range(column) if taken[c] == j]
        U[:, column] = H @ U[:, earlier[-1]] if earlier else V.T @ sys.B[:, j]
        taken.append(j)
    U = np.triu(U)
    rows, structure = [], []
    for j in sorted(set(chains)):
        last = max(c for c in range(n) if chains[c] == j)
        q = np.linalg.solve(U.T, np.eye(n)[last])
        mu = chains.count(j)
        for k in range(mu):
            rows.append(q)
            structure.append((j, mu - 1 - k))
            q = q @ H
    T = np.array(rows)
    form = _companion_structure(T, H, V.T @ sys.B, sys.C @ V, structure, chains)
    return StateSpace(*form, sys.D), T @ V.T / d


def _unreachable(sys: StateSpace) -> Array:
    """Rows that no input reaches, shape (unreachable, n)."""
    scaled, d = in_natural_units(sys)
    reached = reached_states(scaled.A, scaled.B)
    for blocks, small in attempts(scaled.A, ROUNDING):
        rows = unreachable_rows(blocks, scaled.A, scaled.B, small)
        if are_unreached(rows, reached, ROUNDING):
            return np.vstack(rows) / d
    return np.zeros((0, sys.n))


def _companion_structure(
    T: Array, H: Array, B: Array, C: Array, structure: list[tuple[int, int]], chains: list[int]
) -> tuple[Array, Array, Array]:
    """A, B, C in the basis T; the zeros and ones of the theorem are written exactly."""
    n, m = B.shape
    A = np.zeros((n, n))
    last_rows = [row for row, (_, left) in enumerate(structure) if left == 0]
    for row in set(range(n)) - set(last_rows):
        A[row, row + 1] = 1.0
    solved = np.linalg.solve(T.T, np.vstack([T[last_rows] @ H, C]).T).T
    A[last_rows] = solved[: len(last_rows)]
    TB = T @ B
    Bc = np.zeros((n, m))
    for row in last_rows:
        i, mu = structure[row][0], chains.count(structure[row][0])
        # A chain that ended before this one can still enter here; the others enter at their own.
        free = [j for j in range(m) if chains.count(j) < mu]
        Bc[row, free] = TB[row, free]
        Bc[row, i] = 1.0
    return A, Bc, solved[len(last_rows) :]


def _krylov_basis(A: Array, B: Array) -> tuple[Array, Array, list[int]]:
    """Orthonormal V from b_1 .. b_m, A b_1 .. A b_m, ..; H = V^T A V; the input of each column.

    A vector that depends on those before it ends its chain: the lengths are the Kronecker indices.
    """
    n, m = B.shape
    V = np.zeros((n, n))
    chains: list[int] = []
    newest = {j: B[:, j] for j in range(m)}
    scale = {j: np.linalg.norm(B[:, j]) for j in range(m)}
    while len(chains) < n:
        for j in sorted(newest):
            r, v = len(chains), newest[j]
            if r == n:
                break
            for _ in range(2):  # twice is enough (Kahan, Parlett)
                v = v - V[:, :r] @ (V[:, :r].T @ v)
            if np.linalg.norm(v) <= 1e-11 * scale[j] and len(newest) > 1:
                del newest[j]
                continue
            V[:, r] = v / np.linalg.norm(v)
            chains.append(j)
            newest[j] = A @ V[:, r]
            scale[j] = np.linalg.norm(A)
    return V, V.T @ A @ V, chains


# --- modal form -----------------------------------------------------------------------------------


def modal_form(sys: StateSpace) -> tuple[StateSpace, Array]:
    """Real block-diagonal form, slowest modes first.

    A real pole is a 1 x 1 block; a pair a +- i w is [[a, w], [-w, a]], a rotation that shrinks.
    Poles that rounding errors cannot tell apart stay together: where A can be diagonalised on them
    the block is diagonal, where it cannot (a Jordan block) it is triangular and a warning says so.

    Parameters
    ----------
    sys : StateSpace

    Returns
    -------
    system : StateSpace
    T : ndarray, shape (n, n)
        sys.transform(T) = system.

    Warns
    -----
    IllConditionedWarning
        When a group of poles could not be split, or the condition number of T is above 1e8, the
        states in their natural units.
    """
    scaled, d = in_natural_units(sys)
    blocks = sorted(decouple(scaled.A), key=lambda b: (-np.abs(b.poles).max(), -b.poles[0].real))
    A, rows, columns = np.zeros_like(sys.A), [np.zeros((0, sys.n))], [np.zeros((sys.n, 0))]
    start = 0
    for block in blocks:
        noise = EPS * np.linalg.norm(scaled.A) * np.linalg.norm(block.L) * np.linalg.norm(block.V)
        Ai, L, V = _standard_block(replace(block, L=block.L / d, V=d[:, None] * block.V), noise)
        own = slice(start, start + block.size)
        A[own, own] = Ai
        rows.append(L)
        columns.append(V)
        start += block.size
    T, V = np.vstack(rows), np.hstack(columns)
    _warn_if_ill_conditioned("modal_form", T * d)
    return StateSpace(A, T @ sys.B, sys.C @ V, sys.D), T


def _standard_block(block: Block, noise: float) -> tuple[Array, Array, Array]:
    """A block with unit columns of V; [[a, w], [-w, a]] for a pair; diagonal where it can be."""
    Ai, L, V = block.A, block.L, block.V
    if block.is_complex:
        # D A D^{-1} with D = diag(1, d) makes the off-diagonal entries opposite.
        d = np.sign(Ai[0, 1]) * np.sqrt(-Ai[0, 1] / Ai[1, 0])
        a, w = Ai[0, 0], np.sqrt(-Ai[0, 1] * Ai[1, 0])
        size = np.linalg.norm(V[:, 0])
        D = np.array([1.0, d]) * size
        return np.array([[a, w], [-w, a]]), D[:, None] * L, V / D
    if block.size == 1:
        size = np.linalg.norm(V) * np.sign(V[np.abs(V).argmax(), 0])
        return Ai, L * size, V / size
    pair = is_pair(Ai)
    own = (
        np.diag(np.diag(Ai))
        + np.diag(np.diag(Ai, 1) * pair, 1)
        + np.diag(np.diag(Ai, -1) * pair, -1)
    )
    coupling = Ai - own
    if np.linalg.norm(coupling) <= 1e3 * noise:
        return own, L, V
    warnings.warn(
        f"modal_form: {block.size} poles near {np.round(block.poles.mean(), 6)} cannot be split in "
        "double precision (a Jordan block, or very close to one); they keep a triangular block",
        IllConditionedWarning,
        stacklevel=3,
    )
    return Ai, L, V


# --- balanced and staircase forms -----------------------------------------------------------------


def balanced_form(sys: StateSpace) -> tuple[StateSpace, Array]:
    """Balanced form: both Gramians equal diag(Hankel singular values), largest first.

    Parameters
    ----------
    sys : StateSpace
        Stable and minimal.

    Returns
    -------
    system : StateSpace
    T : ndarray, shape (n, n)
        sys.transform(T) = system.

    Raises
    ------
    ValueError
        If sys is not stable, or has Hankel singular values that are zero to working precision.

    Warns
    -----
    IllConditionedWarning
        When the condition number of T is above 1e8.
    """
    require_stable(sys)
    S, R = gramian_factor(sys.A, sys.B), gramian_factor(sys.A.T, sys.C.T)
    T, V, _ = balancing_projection(S, R, sys.n)
    _warn_if_ill_conditioned("balanced_form", T)
    return StateSpace(T @ sys.A @ V, T @ sys.B, sys.C @ V, sys.D), T


def staircase_form(sys: StateSpace) -> tuple[StateSpace, Array]:
    """Staircase form by an orthogonal T: A is block Hessenberg, B is zero below its first block.

    The last states, which no input reaches, are cut off exactly:

        A' = [A_r  *  ]      B' = [B_r]      (A_r, B_r) reachable
             [0   A_u ]           [0  ]

    Parameters
    ----------
    sys : StateSpace

    Returns
    -------
    system : StateSpace
        Entries that the theorem says are zero are exactly zero.
    T : ndarray, shape (n, n)
        Orthogonal, sys.transform(T) = system.
    """
    n = sys.n
    if n == 0:
        return sys, np.eye(0)
    T, reached = orthogonal_split(sys.A, _unreachable(sys))
    A, B = T @ sys.A @ T.T, T @ sys.B
    A[reached:, :reached] = 0.0
    B[reached:] = 0.0
    top, width = 0, 0  # the coupling into the states from `top` on comes from the `width` before
    while top < reached:
        coupling = B[:reached] if top == 0 else A[top:reached, top - width : top]
        W, s, _ = np.linalg.svd(coupling)
        rank = max(1, int((s > n * EPS * s[0]).sum()))
        own = slice(top, reached)
        A[own], B[own], T[own] = W.T @ A[own], W.T @ B[own], W.T @ T[own]
        A[:, own] = A[:, own] @ W
        if top == 0:
            B[rank:] = 0.0
        else:
            A[top + rank : reached, top - width : top] = 0.0
        top, width = top + rank, rank
    return StateSpace(A, B, sys.C @ T.T, sys.D), T
