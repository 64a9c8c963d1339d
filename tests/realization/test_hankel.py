"""Hankel matrices and Ho-Kalman: Kronecker's theorem, exact recovery, choosing an order."""

from __future__ import annotations

import warnings

import control
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_systems import jordan_system, random_system, relative_error, systems

from realization import (
    IllConditionedWarning,
    StateSpace,
    block_hankel,
    hankel_singular_values,
    ho_kalman,
    minimal,
    order_by_bic,
    order_by_gap,
    parallel,
    similarity,
)
from realization.hankel import _fast_products, leading_svd


@settings(max_examples=30, deadline=None)
@given(sys=systems(), rows=st.integers(1, 8), cols=st.integers(1, 8))
def test_hankel_blocks_are_markov_parameters(sys, rows, cols):
    markov = sys.markov(rows + cols)
    H = block_hankel(markov, rows, cols)
    assert H.shape == (rows * sys.p, cols * sys.m)
    for i in range(rows):
        for j in range(cols):
            block = H[i * sys.p : (i + 1) * sys.p, j * sys.m : (j + 1) * sys.m]
            assert np.array_equal(block, markov[i + j + 1])


@settings(max_examples=40, deadline=None)
@given(sys=systems(radius=0.95))
def test_the_rank_of_the_hankel_matrix_is_the_order(sys):
    rows = sys.n + 2
    s = np.linalg.svd(block_hankel(sys.markov(2 * rows), rows, rows), compute_uv=False)
    floor = len(s) * np.finfo(float).eps * s[0]
    if s[sys.n - 1] > 1e3 * floor:  # else the system has a state of the size of rounding errors
        assert (s > floor).sum() == sys.n
        assert order_by_gap(s) == sys.n or s[:-1].max() / s[1:].min() > 1e8


@settings(max_examples=60, deadline=None)
@given(sys=systems(), extra=st.integers(0, 20))
def test_exact_markov_parameters_give_the_system_back(sys, extra):
    markov = sys.markov(2 * sys.n + 2 + extra)
    for result in (ho_kalman(markov), ho_kalman(markov, sys.n)):
        assert result.n <= sys.n
        assert relative_error(result.markov(len(markov)), markov) < 1e-9
        assert np.array_equal(result.D, sys.D)


@settings(max_examples=30, deadline=None)
@given(sys=systems(max_order=5, radius=0.9))
def test_what_comes_back_is_the_same_system_in_another_basis(sys):
    markov = sys.markov(60)
    T = similarity(sys, ho_kalman(markov, sys.n), tol=1e-5)
    assert np.isfinite(T).all() and np.linalg.matrix_rank(T) == sys.n


def test_two_n_plus_one_markov_parameters_suffice_and_fewer_do_not():
    sys = random_system(0, 4, 1, 1, radius=0.9)
    markov = sys.markov(40)
    enough = ho_kalman(markov[: 2 * sys.n + 2], sys.n)
    assert relative_error(enough.markov(40), markov) < 1e-9
    short = ho_kalman(markov[: 2 * sys.n - 1], sys.n - 1)
    assert relative_error(short.markov(40), markov) > 1e-6


def test_defective_and_unstable_systems_are_realized():
    for pole in (0.5, 1.0, 1.1):
        sys = jordan_system(pole, 3, 2, 2)
        markov = sys.markov(16)
        assert relative_error(ho_kalman(markov).markov(16), markov) < 1e-10


def test_delays_and_zero_are_realized():
    delay = np.zeros((10, 1, 1))
    delay[4] = 1.0
    result = ho_kalman(delay)
    assert result.n == 4 and relative_error(result.markov(10), delay) < 1e-12
    zero = ho_kalman(np.zeros((9, 2, 3)))
    assert zero.n == 0 and zero.markov(9).shape == (9, 2, 3)
    assert ho_kalman(np.ones((1, 1, 1))).n == 0


def test_a_redundant_realization_shrinks_to_its_order():
    sys = random_system(2, 3, 2, 2, radius=0.9)
    twice = parallel(sys, sys)
    assert ho_kalman(twice.markov(20)).n == minimal(twice).n == 3


def test_over_long_records_give_the_balanced_basis():
    sys = random_system(1, 4, 2, 2, radius=0.8)
    result = ho_kalman(sys.markov(300), 4)
    s = np.linalg.svd(block_hankel(sys.markov(300), 150, 150), compute_uv=False)[:4]
    assert np.allclose(s, hankel_singular_values(sys), rtol=1e-9)
    assert np.allclose(hankel_singular_values(result), s, rtol=1e-9)


@pytest.mark.parametrize("m, p, blocks", [(1, 1, 500), (3, 2, 150)])
def test_products_by_fft_are_products(m, p, blocks):
    rng = np.random.default_rng(0)
    markov = rng.standard_normal((2 * blocks, p, m))
    H = block_hankel(markov, blocks, blocks)
    multiply, transposed = _fast_products(markov, blocks, blocks)
    X, Y = rng.standard_normal((blocks * m, 5)), rng.standard_normal((blocks * p, 5))
    assert relative_error(multiply(X), H @ X) < 1e-13
    assert relative_error(transposed(Y), H.T @ Y) < 1e-13


@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-3])
@pytest.mark.parametrize("order", [6, None])
def test_the_randomized_decomposition_agrees_with_the_full_one(noise, order):
    rng = np.random.default_rng(0)
    sys = random_system(3, 6, 2, 2, radius=0.97)
    markov = sys.markov(301) + noise * rng.standard_normal((301, 2, 2))
    full = np.linalg.svd(block_hankel(markov, 151, 150), full_matrices=False)
    U, s, Vt = leading_svd(markov, 151, 150, order, seed=1)
    assert np.abs(s[:6] - full[1][:6]).max() < 1e-12 * s[0]
    # The leading singular spaces agree as well: products of the projectors have norm one.
    overlap = np.linalg.svd(U[:, :6].T @ full[0][:, :6], compute_uv=False)
    assert overlap.min() > 1 - 1e-9
    assert np.abs(U[:, :6] * s[:6] @ Vt[:6] - full[0][:, :6] * full[1][:6] @ full[2][:6]).max() < (
        1e-9 * s[0]
    )


def test_the_seed_decides_everything_random():
    markov = random_system(3, 6, 2, 2).markov(401)
    a, b, c = ho_kalman(markov, 6, seed=4), ho_kalman(markov, 6, seed=4), ho_kalman(markov, 6)
    assert a.allclose(b, rtol=0, atol=0)
    assert relative_error(c.markov(401), a.markov(401)) < 1e-10


@pytest.mark.parametrize("m, p", [(1, 1), (2, 3)])
def test_orders_are_found_under_noise(m, p):
    found_bic, found_gap = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sys = random_system(seed, 4, m, p, radius=0.95, condition=2.0)
        sigma = hankel_singular_values(sys)
        markov = sys.markov(120)
        noise = 0.01 * sigma[3] / np.sqrt(120 * max(m, p))
        markov = markov + noise * rng.standard_normal(markov.shape)
        found_bic.append(order_by_bic(markov))
        s = np.linalg.svd(block_hankel(markov, 60, 60), compute_uv=False)
        found_gap.append(order_by_gap(s))
        assert ho_kalman(markov).n == found_bic[-1]
    assert np.mean(np.array(found_bic) == 4) >= 0.9
    assert np.mean(np.array(found_gap) == 4) >= 0.6


def test_noise_alone_has_no_state():
    rng = np.random.default_rng(0)
    orders = [order_by_bic(rng.standard_normal((80, 1, 1))) for _ in range(20)]
    assert np.mean(np.array(orders) == 0) >= 0.8


def test_an_order_above_the_rank_warns():
    markov = random_system(0, 3, 1, 1, radius=0.9).markov(30)
    with pytest.warns(IllConditionedWarning, match="order 5 is above the numerical rank 3"):
        ho_kalman(markov, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ho_kalman(markov, 3)


def test_errors_are_those_of_python_control_or_smaller():
    sys = random_system(5, 8, 2, 2, radius=0.95)
    markov = sys.markov(161)
    theirs, _ = control.eigensys_realization(np.moveaxis(markov, 0, 2), 8, m=80, n=80)
    theirs = StateSpace(theirs.A, theirs.B, theirs.C, theirs.D)
    ours = ho_kalman(markov, 8)
    error = relative_error(ours.markov(161), markov)
    assert error < 1e-12
    assert error < 10 * relative_error(theirs.markov(161), markov) + 1e-14


def test_wrong_arguments_are_named():
    markov = random_system(0, 3, 2, 1).markov(10)
    for call, word in [
        (lambda: ho_kalman(markov[:, 0]), "markov must have 3 dimensions"),
        (lambda: ho_kalman(np.zeros((0, 1, 1))), "markov must have shape"),
        (lambda: ho_kalman(markov * np.nan), "markov must be finite"),
        (lambda: ho_kalman(markov, 5), "order must be an integer in 0 .. 4"),
        (lambda: ho_kalman(markov, -1), "order must be an integer"),
        (lambda: ho_kalman(markov, 2.0), "order must be an integer"),
        (lambda: block_hankel(markov, 6, 5), "rows \\+ cols = 11"),
        (lambda: block_hankel(markov, 0, 5), "rows must be a positive"),
        (lambda: order_by_gap([1.0, 2.0]), "descending"),
        (lambda: order_by_gap([]), "descending"),
        (lambda: order_by_bic(markov[:2]), "at least 3"),
    ]:
        with pytest.raises(ValueError, match=word):
            call()
    assert order_by_gap([0.0, 0.0]) == 0
    assert order_by_gap([3.0, 2.0, 1e-9]) == 2
