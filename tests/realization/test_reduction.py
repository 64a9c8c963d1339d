"""Gramians, Hankel singular values, and the error bounds of truncation."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_systems import change_of_basis, jordan_system, random_system, relative_error, systems
from scipy.linalg import solve_discrete_lyapunov

from realization import (
    StateSpace,
    balanced_form,
    balanced_truncation,
    block_hankel,
    hankel_singular_values,
    minimal,
    observability_gramian,
    reachability_gramian,
    stochastic_balanced_truncation,
)

CIRCLE = np.exp(1j * np.pi * np.linspace(0, 1, 500))


def peak(responses):
    """Largest singular value over the points."""
    return np.linalg.norm(responses, 2, axis=(1, 2)).max()


@settings(max_examples=40, deadline=None)
@given(sys=systems(radius=0.99))
def test_gramians_solve_their_lyapunov_equations(sys):
    P, Q = reachability_gramian(sys), observability_gramian(sys)
    assert relative_error(sys.A @ P @ sys.A.T + sys.B @ sys.B.T, P) < 1e-11
    assert relative_error(sys.A.T @ Q @ sys.A + sys.C.T @ sys.C, Q) < 1e-11
    assert relative_error(P, solve_discrete_lyapunov(sys.A, sys.B @ sys.B.T)) < 1e-9


@settings(max_examples=40, deadline=None)
@given(sys=systems(radius=0.9), seed=st.integers(0, 1000))
def test_hankel_singular_values_are_those_of_the_hankel_matrix_in_every_basis(sys, seed):
    sigma = hankel_singular_values(sys)
    H = block_hankel(sys.markov(400), 200, 200)
    exact = np.linalg.svd(H, compute_uv=False)[: sys.n]
    assert np.abs(sigma - exact[: sigma.size]).max() < 1e-10 * sigma[0]
    T = change_of_basis(np.random.default_rng(seed), sys.n, 10.0)
    assert np.abs(hankel_singular_values(sys.transform(T)) - sigma).max() < 1e-10 * sigma[0]


def test_small_hankel_singular_values_are_not_lost_to_squaring():
    # sigma of A = diag(a), B = C^T = sqrt(g): closed form for one state, g / (1 - a^2).
    a, g = np.array([0.9, 0.5]), np.array([1.0, 1e-12])
    sys = StateSpace(np.diag(a), np.sqrt(g)[:, None] * np.eye(2), np.sqrt(g)[None, :] * np.eye(2))
    assert np.allclose(hankel_singular_values(sys), g / (1 - a**2), rtol=1e-12)


def test_hankel_singular_values_against_forty_digits():
    sys = random_system(11, 3, 1, 1, radius=0.8)
    with mpmath.workdps(40):
        A, B, C = (mpmath.matrix(X.tolist()) for X in (sys.A, sys.B, sys.C))
        P, Q, power = mpmath.zeros(3), mpmath.zeros(3), mpmath.eye(3)
        for _ in range(450):
            P += power * B * B.T * power.T
            Q += power.T * C.T * C * power
            power = power * A
        exact = sorted((mpmath.sqrt(mpmath.re(v)) for v in mpmath.eig(P * Q)[0]), reverse=True)
        exact = np.array([float(v) for v in exact])
    assert np.abs(hankel_singular_values(sys) - exact).max() < 1e-13 * exact[0]


@settings(max_examples=40, deadline=None)
@given(sys=systems(radius=0.99), data=st.data())
def test_the_error_of_balanced_truncation_obeys_its_bound(sys, data):
    order = data.draw(st.integers(0, minimal(sys).n), label="order")
    reduced, bound = balanced_truncation(sys, order)
    assert reduced.n == order and reduced.is_stable
    error = peak(sys.transfer_function(CIRCLE) - reduced.transfer_function(CIRCLE))
    sigma = hankel_singular_values(sys)
    assert error <= bound + 1e-10 * sigma[0]
    # No system of that order comes closer than sigma_{order + 1} (Nehari), so the test has teeth:
    # the error measured on the grid cannot be far below it.
    if order < sys.n and sys.spectral_radius < 0.95:
        assert error >= 0.9 * sigma[order]


@settings(max_examples=30, deadline=None)
@given(sys=systems(max_order=8, max_ports=1, radius=0.9), m=st.integers(1, 3), data=st.data())
def test_the_relative_error_of_stochastic_truncation_obeys_its_bound(sys, m, data):
    seed = data.draw(st.integers(0, 1000), label="seed")
    sys = random_system(seed, sys.n, m, m, radius=0.9)
    sys = StateSpace(sys.A, sys.B, sys.C, np.eye(m) * (1 + np.abs(sys.D).max()))
    zeros = np.linalg.eigvals(sys.A - sys.B @ np.linalg.solve(sys.D, sys.C))
    if np.abs(np.abs(zeros) - 1).min() < 1e-3:
        return
    order = data.draw(st.integers(0, sys.n), label="order")
    reduced, bound = stochastic_balanced_truncation(sys, order)
    G, Gr = sys.transfer_function(CIRCLE), reduced.transfer_function(CIRCLE)
    assert peak(np.linalg.solve(G, G - Gr)) <= bound * (1 + 1e-6) + 1e-7


def test_stochastic_singular_values_are_canonical_correlations():
    # AR(1), y_t = a y_{t-1} + e_t: past and future meet in y alone, at an angle of cosine a.
    a = 0.8
    sys = StateSpace([[a]], [[1.0]], [[a]], [[1.0]])
    _, bound = stochastic_balanced_truncation(sys, 0)
    assert np.isclose(bound, (1 + a) / (1 - a) - 1, rtol=1e-10)


def test_the_relative_criterion_keeps_what_is_quiet_and_sharp():
    # Channel 1 is loud with a mild resonance, channel 2 is ten thousand times quieter with a sharp
    # one. With two states to spend the absolute criterion hears loudness, the relative one shape.
    def resonance(radius, angle, gain):
        a1, a2 = 2 * radius * np.cos(angle), -(radius**2)
        return StateSpace(
            np.array([[a1, a2], [1.0, 0.0]]),
            np.array([[1.0], [0.0]]),
            gain * np.array([[a1, a2]]),
            np.array([[gain]]),
        )

    loud, quiet = resonance(0.5, 1.0, 100.0), resonance(0.98, 2.0, 0.01)
    zero = np.zeros((2, 2))
    sys = StateSpace(
        np.block([[loud.A, zero], [zero, quiet.A]]),
        np.block([[loud.B, np.zeros((2, 1))], [np.zeros((2, 1)), quiet.B]]),
        np.block([[loud.C, np.zeros((1, 2))], [np.zeros((1, 2)), quiet.C]]),
        np.diag([100.0, 0.01]),
    )
    G = sys.transfer_function(CIRCLE)
    absolute, _ = balanced_truncation(sys, 2)
    relative, bound = stochastic_balanced_truncation(sys, 2)
    assert np.allclose(np.abs(absolute.poles), 0.5, atol=0.1)
    assert np.allclose(np.abs(relative.poles), 0.98, atol=1e-6)
    assert peak(np.linalg.solve(G, G - relative.transfer_function(CIRCLE))) <= bound


def test_truncation_of_a_defective_system():
    sys = jordan_system(0.5, 4)
    reduced, bound = balanced_truncation(sys, 3)
    error = peak(sys.transfer_function(CIRCLE) - reduced.transfer_function(CIRCLE))
    assert 0 < error <= bound


@pytest.mark.parametrize("function", [reachability_gramian, hankel_singular_values, balanced_form])
def test_powers_beyond_double_precision_are_refused(function):
    """Stable on paper; rounding in the squared powers of a companion form outgrows the decay."""
    A = np.eye(9, k=1)
    A[-1] = -np.poly(np.linspace(0.7, 0.95, 9))[:0:-1]
    machine = StateSpace(A, np.eye(9)[:, -1:], np.eye(9)[:1])
    assert machine.is_stable
    with pytest.raises(ValueError, match="do not decay in double precision"):
        function(machine)


def test_wrong_arguments_are_named():
    stable = random_system(0, 3, 1, 1)
    unstable = StateSpace([[1.0]], [[1.0]], [[1.0]])
    wide = random_system(0, 3, 2, 1)
    outside = StateSpace([[0.5]], [[1.0]], [[-2.5]], [[1.0]])  # G(3) = 0, which is allowed
    minus_one = StateSpace([[0.5]], [[1.0]], [[-1.5]], [[-1.0]])  # G(-1) = 0
    for call, word in [
        (lambda: reachability_gramian(unstable), "must be stable"),
        (lambda: observability_gramian(unstable), "must be stable"),
        (lambda: hankel_singular_values(unstable), "must be stable"),
        (lambda: balanced_truncation(unstable, 0), "must be stable"),
        (lambda: balanced_truncation(stable, 4), "order must lie in"),
        (lambda: balanced_truncation(stable, -1), "order must lie in"),
        (lambda: balanced_truncation(stable, 1.5), "order must be an integer"),
        (lambda: stochastic_balanced_truncation(wide, 1), "must be square"),
        (lambda: stochastic_balanced_truncation(minus_one, 0), "zero on the unit circle"),
    ]:
        with pytest.raises(ValueError, match=word):
            call()
    assert stochastic_balanced_truncation(outside, 1)[0].n == 1


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_hankel_singular_values_do_not_depend_on_the_units_of_the_states(one, two):
    slow = StateSpace(np.diag([0.5, 0.999999]), [[1.0], [1.0]], [[1.0, 1.0]])
    other = slow.transform(np.diag([10.0**one, 10.0**two]))
    assert hankel_singular_values(other) == pytest.approx(hankel_singular_values(slow), rel=1e-9)


def test_a_slow_state_in_small_units_keeps_its_hankel_singular_value():
    sys = StateSpace(np.diag([0.5, 0.999999]), [[1e10], [1e-10]], [[1e-10, 1e10]])
    twin = sys.transform(np.diag([1e-10, 1e10]))
    assert hankel_singular_values(sys) == pytest.approx([500000.25, 1.33333], rel=1e-5)
    assert hankel_singular_values(sys) == pytest.approx(hankel_singular_values(twin), rel=1e-9)


@pytest.mark.parametrize("exponent", [0, 6, 8.5, 12])
def test_the_relative_error_does_not_depend_on_the_units_of_the_outputs(exponent):
    sys = StateSpace(
        [[0.5, 0.1], [0, 0.2]], [[1.0, 0.3], [0.2, 1.0]], [[1.0, 0.2], [0.5, 0.4]], np.eye(2)
    )
    unit = 10.0 ** np.array([[exponent], [-exponent]])
    other = StateSpace(sys.A, sys.B, unit * sys.C, unit * sys.D)
    (expected, bound), (found, other_bound) = (
        stochastic_balanced_truncation(s, 1) for s in (sys, other)
    )
    assert other_bound == pytest.approx(bound, rel=1e-8)
    assert found.markov(20) / unit == pytest.approx(expected.markov(20), rel=1e-8, abs=1e-12)


def test_a_system_without_state_is_its_own_truncation():
    gain = StateSpace(np.zeros((0, 0)), np.zeros((0, 1)), np.zeros((1, 0)), [[2.0]])
    reduced, bound = stochastic_balanced_truncation(gain, 0)
    assert reduced.allclose(gain) and bound == 0
