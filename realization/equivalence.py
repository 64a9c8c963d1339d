"""What two realizations of one input-output map have to do with each other.

    minimal     a state that no input reaches, or no output sees, can go: what is left is minimal
    similarity  two minimal realizations differ by one T only:  T A1 = A2 T, T B1 = B2, C1 = C2 T

Glossary
    T (n, n)          change of basis, sys1.transform(T) = sys2
    L_i, V_i, A_i     left basis, right basis and block of one group of poles (see `decoupling`)
    X_i (k_i, k_i)    what T does between the groups i of the two systems

Source: Kalman, SIAM J. Control 1 (1963); Kailath, Linear Systems (1980), section 2.4 and
theorem 6.2-4.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from realization.decoupling import (
    ROUNDING,
    Block,
    are_unreached,
    attempts,
    decouple,
    in_natural_units,
    orthogonal_split,
    reached_states,
    unreachable_rows,
)
from realization.systems import Array, StateSpace, reachability_matrix


def minimal(sys: StateSpace, tol: float | None = None) -> StateSpace:
    """Drop every state that no input reaches or no output sees.

    A mode is dropped when a perturbation of A, B, C of relative size `tol` would make it
    unreachable or unobservable, the states in their natural units; the effect of such a
    perturbation on each mode is worked out, so that badly scaled bases and slow chains need no
    tolerance of their own. Modes that coincide are examined together, by a staircase.

    Parameters
    ----------
    sys : StateSpace
    tol : float, optional
        0 < tol < 1; 1e-13, rounding errors, when left out. When the entries of A, B, C are known to
        d digits only, 10**-d.

    Returns
    -------
    StateSpace
        With the same Markov parameters; `sys` itself when it is minimal.

    Raises
    ------
    ValueError
        If tol is not between 0 and 1.
    """
    tol = ROUNDING if tol is None else float(tol)
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol}")
    if sys.n == 0:
        return sys
    given, (sys, _) = sys, in_natural_units(sys)
    A = sys.A
    reached, heard = reached_states(A, sys.B), reached_states(A.T, sys.C.T)
    for blocks, small in attempts(A, tol):
        # What no output sees is what no input reaches in the transposed system. Both decisions are
        # taken here, where A, B, C still have nothing but rounding errors.
        unreached = unreachable_rows(blocks, A, sys.B, small)
        unseen = unreachable_rows([b.dual() for b in blocks], A.T, sys.C.T, small)
        if are_unreached(unreached, reached, tol) and are_unreached(unseen, heard, tol):
            break
    else:
        return given
    if not any(map(len, unreached)) and not any(map(len, unseen)):
        return given
    unseen = [_orthogonal_to(hidden, lost) for hidden, lost in zip(unseen, unreached)]
    if any(map(len, unreached)):
        T, r = orthogonal_split(A, np.vstack(unreached))
        sys = _keep(sys, T[:r])
        unseen = [hidden @ T[:r].T for hidden in unseen]
    if any(map(len, unseen)):
        T, r = orthogonal_split(sys.A.T, np.vstack(unseen))
        sys = _keep(sys, T[:r])
    return sys


def _orthogonal_to(hidden: Array, lost: Array) -> Array:
    """The part of the row space of `hidden` that is orthogonal to `lost`, both of one block.

    Directions that are neither seen nor reached go with the unreached ones.
    """
    if not len(hidden) or not len(lost):
        return hidden
    U, s, _ = np.linalg.svd(hidden @ lost.T)
    rank = int((s > 1e-8).sum())
    return U[:, rank:].T @ hidden


def _keep(sys: StateSpace, rows: Array) -> StateSpace:
    """The system on the space of some orthonormal rows."""
    return StateSpace(rows @ sys.A @ rows.T, rows @ sys.B, sys.C @ rows.T, sys.D)


def similarity(sys1: StateSpace, sys2: StateSpace, tol: float = 1e-8) -> Array:
    """T with sys1.transform(T) = sys2, for two minimal realizations of one input-output map.

    T is unique. It maps the invariant spaces of A_1 onto those of A_2, so with both systems split
    into modes T = sum_i V2_i X_i L1_i, and each small X_i solves linear equations of its own:

        X A1_i = A2_i X,    X B1_i = B2_i,    C1_i = C2_i X

    Parameters
    ----------
    sys1, sys2 : StateSpace
        Minimal.
    tol : float
        Largest relative residual of T A1 = A2 T, T B1 = B2, C1 = C2 T that counts as equal, the
        states of both in their natural units.

    Returns
    -------
    ndarray, shape (n, n)

    Raises
    ------
    ValueError
        If the systems differ in size or feedthrough, are not minimal, or are not equivalent.
    """
    sizes = [(s.n, s.m, s.p) for s in (sys1, sys2)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"sys2 must have (n, m, p) = {sizes[0]} like sys1, got {sizes[1]}")
    for name, sys in (("sys1", sys1), ("sys2", sys2)):
        order = minimal(sys).n
        if order != sys.n:
            raise ValueError(f"{name} must be minimal, got n={sys.n} states of which {order} count")
    (sys1, d1), (sys2, d2) = in_natural_units(sys1), in_natural_units(sys2)
    candidates = [np.zeros((0, 0))]
    if sys1.n:
        candidates = [_by_modes(sys1, sys2), _by_reachability(sys1, sys2)]
        candidates.append(np.linalg.pinv(_by_reachability(sys2.dual(), sys1.dual()).T).T)
    T = min(candidates, key=lambda T: _residual(T, sys1, sys2))
    residual = _residual(T, sys1, sys2)
    if not residual <= tol:
        raise ValueError(
            "sys1 and sys2 must be equivalent, got different input-output maps "
            f"(relative residual {residual:.1e}, allowed {tol:.1e})"
        )
    return d2[:, None] * T / d1


def _by_modes(sys1: StateSpace, sys2: StateSpace) -> Array:
    """T = sum_i V2_i X_i L1_i: long chains and hardly reached modes do no harm."""
    T = np.zeros((sys1.n, sys1.n))
    for one, two in _matched_blocks(sys1, sys2):
        T += two.V @ _solve_block(one, two, sys1, sys2) @ one.L
    return T


def _by_reachability(sys1: StateSpace, sys2: StateSpace) -> Array:
    """T = R_2 R_1^+ from the states that the same inputs reach: close modes do no harm."""
    rho = max(1.0, sys1.spectral_radius)  # keeps the powers of an unstable A finite
    R1, R2 = (reachability_matrix(s.A / rho, s.B, s.n) for s in (sys1, sys2))
    return np.linalg.lstsq(R1.T, R2.T, rcond=None)[0].T


def _matched_blocks(sys1: StateSpace, sys2: StateSpace) -> list[tuple[Block, Block]]:
    """Blocks of both systems paired by their poles; groups that one keeps together are joined."""
    blocks1, blocks2 = decouple(sys1.A), decouple(sys2.A)
    owner1, owner2 = (
        np.repeat(np.arange(len(blocks)), [b.size for b in blocks]) for blocks in (blocks1, blocks2)
    )
    if not owner1.size:
        return []
    poles1, poles2 = (np.concatenate([b.poles for b in blocks]) for blocks in (blocks1, blocks2))
    pairs = linear_sum_assignment(np.abs(poles1[:, None] - poles2[None, :]))
    overlap = np.zeros((len(blocks1), len(blocks2)), dtype=bool)
    overlap[owner1[pairs[0]], owner2[pairs[1]]] = True
    matched, left = [], set(range(len(blocks1)))
    while left:
        group1 = {left.pop()}
        while True:
            group2 = set(np.flatnonzero(overlap[sorted(group1)].any(axis=0)))
            grown = set(np.flatnonzero(overlap[:, sorted(group2)].any(axis=1)))
            if grown == group1:
                break
            group1 = grown
        left -= group1
        matched.append((_join([blocks1[i] for i in group1]), _join([blocks2[i] for i in group2])))
    return matched


def _join(blocks: list[Block]) -> Block:
    """One block from several."""
    if len(blocks) == 1:
        return blocks[0]
    ends = np.cumsum([0] + [b.size for b in blocks])
    A = np.zeros((ends[-1], ends[-1]))
    for b, start in zip(blocks, ends):
        A[start : start + b.size, start : start + b.size] = b.A
    return Block(
        A,
        np.vstack([b.L for b in blocks]),
        np.hstack([b.V for b in blocks]),
        np.concatenate([b.poles for b in blocks]),
    )


def _solve_block(one: Block, two: Block, sys1: StateSpace, sys2: StateSpace) -> Array:
    """Least-squares X of X A1 = A2 X, X B1 = B2, C2 X = C1, each equation scaled to its data."""
    k = one.size
    B1, B2, C1, C2 = one.L @ sys1.B, two.L @ sys2.B, sys1.C @ one.V, sys2.C @ two.V
    # Both sides in units in which B1, C2 have norm 1; X is then near (size of B2) / (size of B1).
    b1, c2 = np.linalg.norm(B1), np.linalg.norm(C2)
    b2, c1 = np.linalg.norm(B2), np.linalg.norm(C1)
    unit = np.sqrt(max(b2 * c1, np.finfo(float).tiny) / (b1 * c2))
    eye = np.eye(k)
    scale_a = max(np.linalg.norm(one.A), np.finfo(float).tiny)
    rows = [
        np.kron(B1.T / b1, eye),  # vec(X B1), columns stacked
        np.kron(eye, C2 / c2),
        (np.kron(one.A.T, eye) - np.kron(eye, two.A)) / scale_a,
    ]
    right = [(B2 / (b1 * unit)).T.ravel(), (C1 / (c2 * unit)).T.ravel(), np.zeros(k * k)]
    X = np.linalg.lstsq(np.vstack(rows), np.concatenate(right), rcond=None)[0]
    return unit * X.reshape(k, k).T


def _residual(T: Array, sys1: StateSpace, sys2: StateSpace) -> float:
    """Largest relative residual of T A1 = A2 T, T B1 = B2, C1 = C2 T and D1 = D2."""

    def relative(left: Array, right: Array, scale: float) -> float:
        return float(np.linalg.norm(left - right) / max(scale, np.finfo(float).tiny))

    norm = np.linalg.norm
    size = norm(T)
    return max(
        relative(sys1.D, sys2.D, max(norm(sys1.D), norm(sys2.D))),
        relative(T @ sys1.A, sys2.A @ T, size * max(norm(sys1.A), norm(sys2.A))),
        relative(T @ sys1.B, sys2.B, max(size * norm(sys1.B), norm(sys2.B))),
        relative(sys1.C, sys2.C @ T, max(size * norm(sys2.C), norm(sys1.C))),
    )
