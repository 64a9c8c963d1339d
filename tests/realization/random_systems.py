"""Random systems for the tests: a hypothesis strategy and the generator behind it."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from realization import StateSpace


def change_of_basis(rng: np.random.Generator, n: int, condition: float) -> np.ndarray:
    """T with exactly this condition number, log-spaced singular values 1 .. condition."""
    U, V = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    return U * np.logspace(0, np.log10(condition), n) @ V


def random_modes(rng: np.random.Generator, n: int, radius: float = 0.999) -> np.ndarray:
    """Block-diagonal A: real poles and complex pairs, moduli from 0.3 radius up to radius."""
    A = np.zeros((n, n))
    i = 0
    while i < n:
        modulus = radius * rng.uniform(0.3, 1.0)
        if i + 1 < n and rng.random() < 0.5:
            angle = rng.uniform(0.1, 3.0)
            c, s = modulus * np.cos(angle), modulus * np.sin(angle)
            A[i : i + 2, i : i + 2] = [[c, s], [-s, c]]
            i += 2
        else:
            A[i, i] = modulus * rng.choice([-1.0, 1.0])
            i += 1
    return A


def random_system(
    seed: int, n: int, m: int, p: int, *, radius: float = 0.999, condition: float = 10.0
) -> StateSpace:
    """A system with distinct poles, reached and seen, in a basis of the given condition number."""
    rng = np.random.default_rng(seed)
    modes = StateSpace(
        random_modes(rng, n, radius),
        rng.standard_normal((n, m)),
        rng.standard_normal((p, n)),
        rng.standard_normal((p, m)),
    )
    return modes.transform(change_of_basis(rng, n, condition))


@st.composite
def systems(
    draw, max_order: int = 12, max_ports: int = 4, radius: float = 0.999, condition: float = 10.0
) -> StateSpace:
    """Orders 1 to max_order, 1 to max_ports inputs and outputs, poles up to radius."""
    n = draw(st.integers(1, max_order), label="n")
    m = draw(st.integers(1, max_ports), label="m")
    p = draw(st.integers(1, max_ports), label="p")
    seed = draw(st.integers(0, 2**32 - 1), label="seed")
    return random_system(seed, n, m, p, radius=radius, condition=condition)


def jordan_system(pole: float, size: int, m: int = 1, p: int = 1, seed: int = 0) -> StateSpace:
    """One Jordan block, reached at its end and seen at its start: minimal, defective."""
    rng = np.random.default_rng(seed)
    A = pole * np.eye(size) + np.diag(np.ones(size - 1), 1)
    B, C = rng.standard_normal((size, m)), rng.standard_normal((p, size))
    B[-1], C[:, 0] = 1.0, 1.0
    return StateSpace(A, B, C, np.zeros((p, m)))


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value of b."""
    return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(float).tiny))
