"""Is a residual white? Three tests that look at it from three sides.

A predictor has used up the past when its errors e_t are white. Under that hypothesis, with
w_t = F^{-1} e_t whitened across channels (F F' the sample covariance):

    portmanteau    Q = T (T + 2) sum_{h<=H} |R_h|^2 / (T - h),   R_h = (1/T) sum_t w_t w_{t-h}'
                   ~ chi^2 with p^2 (H - fitted) degrees of freedom       (correlation in time)
    runs           number of runs above and below the median, given their counts
                   ~ normal (Wald-Wolfowitz)                              (dependence of signs)
    cumulative     max_j | sum_{i<=j} I_i / sum_i I_i - j / q |
    periodogram    ~ Kolmogorov's statistic of q - 1 uniforms (Bartlett)  (periodic remainders)

The first is Hosking's multivariate form of Ljung and Box. The other two are made for one channel;
for p channels they are applied to each channel of w, which are independent under the hypothesis,
and combined: the sum of squares for runs, Sidak's smallest p-value for the periodogram.

Glossary
    e (T, p)   residuals      H   lags          R_h (p, p)   autocorrelation of w at lag h
    w (T, p)   whitened       q   frequencies   I_j          periodogram at 2 pi j / T

Source: Hosking, The multivariate portmanteau statistic (1980); Wald and Wolfowitz (1940); Bartlett
(1955) and Durbin (1969), tests based on the cumulated periodogram.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.stats
from numpy.typing import ArrayLike

from realization.systems import Array, as_real_array, positive_integer

MIN_LENGTH = 20
CONSTANT = 1e-12  # standard deviation, relative to the largest value, that rounding can leave
DEPENDENT = 1e-7  # what rounding can leave of a channel, in its deviations, next to the others


@dataclass(frozen=True)
class TestResult:
    """A statistic, its reference distribution in words, and its p-value."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    statistic: float
    p_value: float
    reference: str


@dataclass(frozen=True)
class WhitenessResult:
    """Outcome of the three tests.

    Attributes
    ----------
    portmanteau, runs, cumulative_periodogram : TestResult
        Statistic and p-value of each.
    """

    portmanteau: TestResult
    runs: TestResult
    cumulative_periodogram: TestResult

    @property
    def p_value(self) -> float:
        """Of the three together: three times the smallest p-value, at most 1 (Bonferroni)."""
        tests = (self.portmanteau, self.runs, self.cumulative_periodogram)
        return min(1.0, 3 * min(test.p_value for test in tests))

    def is_white(self, level: float = 0.05) -> bool:
        """False when the tests together reject whiteness at this level."""
        return self.p_value >= level


def whiteness_test(
    s: ArrayLike, lags: int | None = None, num_fitted_lags: int = 0
) -> WhitenessResult:
    """Test a residual for whiteness with all three tests.

    Parameters
    ----------
    s : array_like, shape (T,) or (T, p)
        Residuals in the order of time, T >= 20, finite, no constant channel.
    lags : int, optional
        Lags H of the portmanteau test; min(20, T // 10) when left out.
    num_fitted_lags : int
        Degrees of freedom per p^2 that fitting consumed: for a model of order n fitted to the same
        data, about 2 n / p.

    Returns
    -------
    WhitenessResult

    Raises
    ------
    ValueError
        If the shape, the length, a value, or the number of lags is not as above.
    """
    w = _whitened(s)
    return WhitenessResult(
        portmanteau_test(w, lags, num_fitted_lags), runs_test(w), cumulative_periodogram_test(w)
    )


def portmanteau_test(s: ArrayLike, lags: int | None = None, num_fitted_lags: int = 0) -> TestResult:
    """Ljung-Box test in Hosking's multivariate form; parameters as `whiteness_test`."""
    w = _whitened(s)
    T, p = w.shape
    lags = min(20, T // 10) if lags is None else positive_integer("lags", lags)
    if isinstance(num_fitted_lags, bool) or not isinstance(num_fitted_lags, (int, np.integer)):
        raise ValueError(f"num_fitted_lags must be an integer, got {num_fitted_lags!r}")
    if num_fitted_lags < 0:
        raise ValueError(f"num_fitted_lags must be at least 0, got {num_fitted_lags}")
    if not num_fitted_lags < lags < T:
        raise ValueError(f"lags must lie between num_fitted_lags={num_fitted_lags} and T={T}")
    R = autocorrelations(w, lags)
    statistic = float(T * (T + 2) * sum(np.sum(R[h] ** 2) / (T - h) for h in range(1, lags + 1)))
    freedom = p * p * (lags - num_fitted_lags)
    return TestResult(statistic, float(scipy.stats.chi2.sf(statistic, freedom)), f"chi2({freedom})")


def runs_test(s: ArrayLike) -> TestResult:
    """Wald-Wolfowitz runs test about the median, channels combined; s as `whiteness_test`.

    Given n1 values above and n2 below, the number of runs has mean 1 + 2 n1 n2 / N and variance
    2 n1 n2 (2 n1 n2 - N) / (N^2 (N - 1)), N = n1 + n2.
    """
    w = _whitened(s)
    z = np.array([_runs_score(channel) for channel in w.T])
    statistic = float(z @ z)
    return TestResult(statistic, float(scipy.stats.chi2.sf(statistic, z.size)), f"chi2({z.size})")


def _runs_score(x: Array) -> float:
    sign = np.sign(x - np.median(x))
    above = sign[sign != 0] > 0
    N, n1 = above.size, int(above.sum())
    pairs = 2.0 * n1 * (N - n1)
    variance = pairs * (pairs - N) / (N * N * (N - 1.0))
    if variance <= 0:
        raise ValueError("s must take more than two different values around its median")
    runs = 1 + np.count_nonzero(above[1:] != above[:-1])
    return (runs - 1 - pairs / N) / np.sqrt(variance)


def cumulative_periodogram_test(s: ArrayLike) -> TestResult:
    """Bartlett's test, the smallest p-value over the channels (Sidak); s as `whiteness_test`.

    For white Gaussian noise the first q - 1 values of the cumulative periodogram are distributed
    like q - 1 ordered uniforms, so Kolmogorov's exact distribution applies.
    """
    ordered = cumulative_periodogram(_whitened(s))[:-1]
    count, p = ordered.shape
    step = np.arange(count)[:, None] / count
    distances = np.maximum(ordered - step, step + 1 / count - ordered).max(axis=0)
    smallest = scipy.stats.kstwo.sf(distances, count).min()
    p_value = -np.expm1(p * np.log1p(-min(smallest, 1 - 1e-16)))
    return TestResult(float(distances.max()), float(p_value), f"Kolmogorov({count})")


def cumulative_periodogram(s: ArrayLike) -> Array:
    """Share of the periodogram at frequencies up to 2 pi j / T, j = 1 .. q, shape (q, p).

    Parameters
    ----------
    s : array_like, shape (T,) or (T, p)
        A record; its mean does not matter.

    Returns
    -------
    ndarray, shape (q, p)
        Rises from near 0 to 1; for white noise along the straight line j / q. q is (T - 1) // 2:
        frequencies 0 and pi, whose periodogram has another distribution, are left out.

    Raises
    ------
    ValueError
        If the shape or a value is not as above, or a channel has no power at these frequencies.
    """
    s = _two_dimensional(s)
    q = (len(s) - 1) // 2
    power = np.abs(scipy.fft.rfft(s, axis=0)[1 : q + 1]) ** 2
    total = power.sum(axis=0)
    if not (total > 0).all():
        raise ValueError("s must have power at frequencies between 0 and pi in every channel")
    return np.cumsum(power, axis=0) / total


def autocorrelations(s: ArrayLike, lags: int) -> Array:
    """R_h = (1/T) sum_t s_t s_{t-h}', h = 0 .. lags, shape (lags + 1, p, p); mean not removed."""
    s = _two_dimensional(s)
    T = len(s)
    if isinstance(lags, bool) or not isinstance(lags, (int, np.integer)) or not 0 <= lags < T:
        raise ValueError(f"lags must be an integer in 0 .. {T - 1}, got {lags!r}")
    return np.array([s[h:].T @ s[: T - h] / T for h in range(lags + 1)])


# --- checks ---------------------------------------------------------------------------------------


def _two_dimensional(s: ArrayLike) -> Array:
    s = np.asarray(s)
    return as_real_array("s", s[:, None] if s.ndim == 1 else s, 2)


def _whitened(s: ArrayLike) -> Array:
    """(s - mean) F'^{-1} with F F' the sample covariance: channels uncorrelated at lag 0."""
    s = _two_dimensional(s)
    T, p = s.shape
    if max(MIN_LENGTH, 4 * p) > T or p < 1:
        raise ValueError(f"s must have at least {max(MIN_LENGTH, 4 * p)} rows, got shape {s.shape}")
    centred = s - s.mean(axis=0)
    deviation = np.sqrt((centred**2).mean(axis=0))
    if (deviation <= CONSTANT * np.abs(s).max(axis=0)).any():
        raise ValueError("s must have linearly independent, non-constant channels")
    z = centred / deviation
    try:  # of the correlations: the units of the channels have no say in their independence
        factor = np.linalg.cholesky(z.T @ z / T)
    except np.linalg.LinAlgError:
        factor = np.zeros((p, p))
    if np.diag(factor).min() <= DEPENDENT:
        raise ValueError("s must have linearly independent, non-constant channels")
    return np.linalg.solve(factor, z.T).T
