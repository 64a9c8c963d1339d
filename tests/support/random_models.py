"""Random linear systems for property tests: real, complex, repeated and slow poles."""

import numpy as np
import scipy.linalg
from hypothesis import strategies as st

from realization import StochasticRealization

seeds = st.integers(0, 2**32 - 1)


def random_A(rng: np.random.Generator, n: int, radius: float, repeated: bool = False):
    """Real (n, n) matrix of the given spectral radius, moderately conditioned eigenvectors."""
    blocks, size = [], 0
    while size < n:
        r = radius if not blocks else radius * rng.uniform(0.1, 1.0)
        if n - size >= 2 and rng.random() < 0.5:
            angle = rng.uniform(0.1, 3.0)
            cos, sin = r * np.cos(angle), r * np.sin(angle)
            blocks.append(np.array([[cos, sin], [-sin, cos]]))
        elif repeated and n - size >= 2:
            blocks.append(np.array([[0.6 * r, 0.3], [0.0, 0.6 * r]]))  # a Jordan block
        else:
            blocks.append(np.array([[r * rng.choice([-1.0, 1.0])]]))
        size += len(blocks[-1])
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    T = Q * np.exp(rng.uniform(-0.7, 0.7, n))
    return T @ scipy.linalg.block_diag(*blocks) @ np.linalg.inv(T)


def random_realization(
    seed: int, n: int, p: int, m: int = 0, radius: float = 0.9, repeated: bool = False
) -> StochasticRealization:
    """Full-rank, correlated noises; B and D when m > 0."""
    rng = np.random.default_rng(seed)
    A = random_A(rng, n, radius, repeated)
    C = rng.standard_normal((p, n))
    W = rng.standard_normal((n + p, n + p + 2)) / np.sqrt(n + p)
    M = W @ W.T
    B, D = (rng.standard_normal((n, m)), rng.standard_normal((p, m))) if m else (None, None)
    return StochasticRealization(A, C, M[:n, :n], M[n:, n:], M[:n, n:], B, D)


def block_toeplitz(cov: np.ndarray, k: int) -> np.ndarray:
    """Covariance (k p, k p) of [y_0; ..; y_{k-1}] from lags L_h = E y_{t+h} y_t'."""
    return np.block([[cov[s - t] if s >= t else cov[t - s].T for t in range(k)] for s in range(k)])
