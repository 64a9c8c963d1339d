"""Whiteness tests: their size by Monte Carlo, their power, and their statistics by other routes."""

import numpy as np
import pytest
import scipy.stats

from realization import (
    autocorrelations,
    cumulative_periodogram,
    cumulative_periodogram_test,
    portmanteau_test,
    runs_test,
    whiteness_test,
)

TRIALS = 1500


@pytest.mark.parametrize(("T", "p"), [(100, 1), (250, 2), (400, 3)])
def test_five_percent_tests_reject_white_noise_three_to_seven_percent_of_the_time(T, p):
    rng = np.random.default_rng(T)
    mixing = rng.standard_normal((p, p))  # correlated channels, unequal units
    results = [whiteness_test(rng.standard_normal((T, p)) @ mixing) for _ in range(TRIALS)]
    for name in ("portmanteau", "runs", "cumulative_periodogram"):
        rate = np.mean([getattr(r, name).p_value < 0.05 for r in results])
        assert 0.03 <= rate <= 0.07, (name, rate)
    joint = np.mean([not r.is_white() for r in results])
    assert 0.02 <= joint <= 0.07  # Bonferroni loses little: three nearly separate views


def test_p_values_of_the_portmanteau_test_are_uniform():
    rng = np.random.default_rng(1)
    p_values = [portmanteau_test(rng.standard_normal(500)).p_value for _ in range(600)]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01


def test_residuals_of_a_fitted_model_need_the_corrected_degrees_of_freedom():
    rng = np.random.default_rng(2)
    rejected = {0: 0, 1: 0}
    for _ in range(500):
        e = rng.standard_normal(300)
        y = scipy.signal.lfilter([1.0], [1.0, -0.5], e)
        phi = y[1:] @ y[:-1] / (y[:-1] @ y[:-1])
        residual = y[1:] - phi * y[:-1]
        for fitted in rejected:
            test = portmanteau_test(residual, lags=3, num_fitted_lags=fitted)
            rejected[fitted] += test.p_value < 0.05
    assert rejected[0] < 0.035 * 500  # too few degrees of freedom spent: the test is timid
    assert 0.03 * 500 <= rejected[1] <= 0.07 * 500


def test_each_test_sees_the_dependence_it_is_made_for():
    rng = np.random.default_rng(3)
    e = rng.standard_normal(500)
    autoregressive = scipy.signal.lfilter([1.0], [1.0, -0.4], e)
    periodic = e + 0.6 * np.cos(0.7 * np.arange(500))
    signs = np.abs(e) * np.sign(autoregressive)
    assert portmanteau_test(autoregressive).p_value < 1e-6
    assert cumulative_periodogram_test(periodic).p_value < 1e-4
    assert runs_test(signs).p_value < 1e-3
    for series in (autoregressive, periodic, signs):
        assert not whiteness_test(series).is_white()
    # Correlation between channels at lag 0 is allowed; across channels at lag 1 it is not.
    pair = rng.standard_normal((501, 2))
    together = np.column_stack([pair[1:, 0], pair[1:, 0] + pair[1:, 1]])
    lagged = np.column_stack([pair[1:, 0], 0.5 * pair[:-1, 0] + pair[1:, 1]])
    assert portmanteau_test(together).p_value > 0.05
    assert portmanteau_test(lagged).p_value < 1e-6


def test_portmanteau_is_ljung_box_for_one_channel():
    diagnostic = pytest.importorskip("statsmodels.stats.diagnostic")
    e = np.random.default_rng(4).standard_normal(200)
    ours = portmanteau_test(e, lags=12, num_fitted_lags=2)
    theirs = diagnostic.acorr_ljungbox(e, lags=[12], model_df=2)
    assert np.isclose(ours.statistic, theirs["lb_stat"].iloc[0], rtol=1e-10)
    assert np.isclose(ours.p_value, theirs["lb_pvalue"].iloc[0], rtol=1e-8)


def test_runs_test_equals_statsmodels_without_continuity_correction():
    runs = pytest.importorskip("statsmodels.sandbox.stats.runs")
    e = np.random.default_rng(5).standard_normal(301)
    score, _ = runs.runstest_1samp(e[e != np.median(e)], cutoff="median", correction=False)
    # With the median itself dropped both halves have 150 values.
    assert np.isclose(runs_test(e).statistic, score**2, rtol=1e-6)


def test_statistics_do_not_depend_on_the_basis_of_the_channels():
    rng = np.random.default_rng(6)
    e, mixing = rng.standard_normal((300, 3)), rng.standard_normal((3, 3))
    assert np.isclose(portmanteau_test(e).statistic, portmanteau_test(e @ mixing).statistic)


def test_autocorrelations_and_cumulative_periodogram_of_known_sequences():
    s = np.array([1.0, 2.0, -1.0, 3.0])
    expected = [15 / 4, (2 - 2 - 3) / 4, (-1 + 6) / 4]
    assert np.allclose(autocorrelations(s, 2)[:, 0, 0], expected)
    t = np.arange(200)
    share = cumulative_periodogram(np.cos(2 * np.pi * 30 * t / 200))[:, 0]
    assert share[28] < 1e-12  # below frequency 30 / 200 nothing, from there on everything
    assert np.allclose(share[29:], 1)
    assert len(share) == 99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: whiteness_test(np.ones(10)), "at least 20 rows"),
        (lambda: whiteness_test(np.ones(100)), "non-constant"),
        (lambda: whiteness_test(np.full(100, np.nan)), "finite"),
        (lambda: whiteness_test(np.ones((50, 2, 2))), "2 dimensions"),
        (lambda: portmanteau_test(np.arange(50.0), lags=50), "lags must lie"),
        (lambda: portmanteau_test(np.arange(50.0), lags=3, num_fitted_lags=3), "lags must lie"),
        (lambda: whiteness_test(np.full(100, 0.1)), "non-constant"),
        (lambda: cumulative_periodogram(np.ones((30, 1))), "s must have power"),
        (lambda: runs_test(np.tile([1.0, 1.0, 1.0, 2.0], 20)), "around its median"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("seed", range(30))
def test_dependent_channels_are_refused_in_any_units(seed):
    rng = np.random.default_rng(seed)
    e = rng.standard_normal((200, 2))
    dependent = (
        np.hstack([e[:, :1], e[:, :1] * rng.uniform(0.1, 9)]),
        np.hstack([e, e @ [[0.3], [0.7]]]),
        np.hstack([e, np.full((200, 1), rng.uniform(0.1, 9))]),
    )
    for s in dependent:
        with pytest.raises(ValueError, match="linearly independent"):
            whiteness_test(s * 10.0 ** rng.uniform(-9, 9, s.shape[1]))


def test_p_values_do_not_depend_on_units():
    e = np.random.default_rng(0).standard_normal((200, 3)) @ [[1, 0.9, 0], [0, 0.1, 0.3], [0, 0, 1]]
    expected, found = whiteness_test(e), whiteness_test(e * [1e-150, 1.0, 1e150])
    for name in ("portmanteau", "runs", "cumulative_periodogram"):
        assert getattr(found, name).p_value == pytest.approx(getattr(expected, name).p_value)


def test_lags_that_mean_nothing_are_refused():
    e = np.random.default_rng(0).standard_normal(100)
    refused = ("lags", 2.5), ("lags", 0), ("num_fitted_lags", -3), ("num_fitted_lags", 1.5)
    for name, value in refused:
        with pytest.raises(ValueError, match="lags"):
            whiteness_test(e, **{name: value})
    for lags in (-1, 100, 1.0):
        with pytest.raises(ValueError, match="lags must be an integer in 0 .. 99"):
            autocorrelations(e, lags)
