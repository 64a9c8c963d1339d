"""StateSpace: the recursion, its invariants under a change of basis, and interconnections."""

from __future__ import annotations

import time

import control
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_systems import change_of_basis, jordan_system, random_system, relative_error, systems

from realization import StateSpace, feedback, parallel, series


def step_by_step(sys, u, x0):
    """The definition, one step at a time."""
    x, y = np.array(x0, dtype=float), []
    for row in u:
        y.append(sys.C @ x + sys.D @ row)
        x = sys.A @ x + sys.B @ row
    return np.array(y)


def as_control(sys):
    return control.ss(sys.A, sys.B, sys.C, sys.D, True)


@settings(max_examples=40, deadline=None)
@given(sys=systems(), steps=st.integers(1, 400), seed=st.integers(0, 1000))
def test_simulate_is_the_recursion_at_any_length(sys, steps, seed):
    rng = np.random.default_rng(seed)
    u, x0 = rng.standard_normal((steps, sys.m)), rng.standard_normal(sys.n)
    y = sys.simulate(u, x0)
    assert y.shape == (steps, sys.p)
    assert relative_error(y, step_by_step(sys, u, x0)) < 1e-12


@pytest.mark.parametrize("pole", [0.999, 1.0, 1.01, 0.0, -0.9])
def test_simulate_needs_no_diagonal_form(pole):
    # A defective A has no basis of modes; the recursion must not notice, growth included.
    sys = jordan_system(pole, 5)
    u = np.random.default_rng(0).standard_normal((2000, 1))
    assert relative_error(sys.simulate(u), step_by_step(sys, u, np.zeros(5))) < 1e-11


def test_simulate_an_unstable_mode_as_the_loop_does():
    unseen = StateSpace(np.diag([10.0, 0.5]), [[0.0], [1.0]], [[0.0, 1.0]])
    y = unseen.simulate(np.ones((100_000, 1)))  # powers of 10 overflow, the state stays 0
    assert relative_error(y[60:], np.full((99_940, 1), 2.0)) < 1e-15
    # Inputs that bring the state back at each step: integers, so the loop has no rounding errors.
    x = np.random.default_rng(0).integers(-3, 4, size=(5001, 1)).astype(float)
    doubling = StateSpace([[2.0]], [[1.0]], [[1.0]])
    assert np.array_equal(doubling.simulate(x[1:] - 2 * x[:-1], x0=x[0]), x[:-1])


def test_simulate_a_million_steps_in_a_second():
    sys = random_system(0, 8, 2, 2)
    u = np.random.default_rng(0).standard_normal((1_000_000, 2))
    best = np.inf
    for _ in range(3):
        start = time.process_time()
        y = sys.simulate(u)
        best = min(best, time.process_time() - start)
    assert best < 1.0
    # The last hundred outputs from a state of their own: no drift over the blocks.
    x = sys.states(u)[-101]
    assert relative_error(y[-100:], step_by_step(sys, u[-100:], x)) < 1e-10


@settings(max_examples=30, deadline=None)
@given(sys=systems(), seed=st.integers(0, 1000))
def test_simulation_is_convolution_with_the_markov_parameters(sys, seed):
    steps = 30
    u = np.random.default_rng(seed).standard_normal((steps, sys.m))
    H = sys.markov(steps)
    y = np.array([sum(H[k] @ u[t - k] for k in range(t + 1)) for t in range(steps)])
    assert relative_error(sys.simulate(u), y) < 1e-11


@settings(max_examples=30, deadline=None)
@given(sys=systems(), seed=st.integers(0, 1000))
def test_markov_parameters_and_transfer_function_do_not_depend_on_the_basis(sys, seed):
    T = change_of_basis(np.random.default_rng(seed), sys.n, 100.0)
    other = sys.transform(T)
    # What the rounding errors of the new basis are relative to: the sizes in that basis.
    size = np.linalg.cond(T) * np.linalg.norm(other.B) * np.linalg.norm(other.C)
    powers = max(np.linalg.norm(np.linalg.matrix_power(other.A, k), 2) for k in range(20))
    bound = 1e-13 * (1 + size * powers)
    assert np.abs(other.markov(20) - sys.markov(20)).max() < bound
    z = 1.5 * np.exp(1j * np.array([0.1, 1.0, 2.0]))
    resolvent = np.linalg.norm(np.linalg.inv(z[:, None, None] * np.eye(sys.n) - other.A), 2, (1, 2))
    error = np.abs(other.transfer_function(z) - sys.transfer_function(z)).max()
    assert error < 1e-13 * (1 + size * resolvent.max())
    assert other.transform(np.linalg.inv(T)).allclose(sys, rtol=1e-7, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(sys=systems(max_order=6))
def test_transfer_function_agrees_with_python_control(sys):
    omega = np.array([0.2, 1.1, 2.9])
    expected = as_control(sys)(np.exp(1j * omega), squeeze=False)
    ours = sys.transfer_function(np.exp(1j * omega))
    assert relative_error(ours, np.moveaxis(expected, -1, 0)) < 1e-9


def test_markov_parameters_against_fifty_digits():
    sys = random_system(3, 4, 2, 2)
    with mpmath.workdps(50):
        A, B, C = (mpmath.matrix(X.tolist()) for X in (sys.A, sys.B, sys.C))
        power, exact = mpmath.eye(4), [sys.D]
        for _ in range(59):
            exact.append(np.array((C * power * B).tolist(), dtype=float))
            power = power * A
    assert relative_error(sys.markov(60), np.array(exact)) < 1e-13


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n1=st.integers(0, 5), n2=st.integers(0, 5), p=st.integers(1, 3))
def test_interconnections_multiply_add_and_close_transfer_functions(seed, n1, n2, p):
    one = random_system(seed, n1, p, p) if n1 else static(seed, p)
    two = random_system(seed + 1, n2, p, p) if n2 else static(seed + 1, p)
    z = 1.7 * np.exp(1j * np.array([0.3, 1.2, 2.5]))
    G, K = one.transfer_function(z), two.transfer_function(z)
    assert relative_error(series(one, two).transfer_function(z), K @ G) < 1e-10
    assert relative_error(parallel(one, two).transfer_function(z), G + K) < 1e-10
    loop = np.eye(p) + G @ K
    if np.linalg.cond(loop).max() < 1e6 and np.linalg.cond(np.eye(p) + one.D @ two.D) < 1e6:
        closed = feedback(one, two).transfer_function(z)
        assert np.abs(loop @ closed - G).max() < 1e-7 * (1 + np.abs(closed).max())


def static(seed, p):
    D = np.random.default_rng(seed).standard_normal((p, p))
    return StateSpace(np.zeros((0, 0)), np.zeros((0, p)), np.zeros((p, 0)), D)


def test_poles_are_sorted_and_decide_stability():
    sys = StateSpace(np.diag([0.2, -0.9, 0.5]), np.ones((3, 1)), np.ones((1, 3)))
    assert np.allclose(sys.poles, [-0.9, 0.5, 0.2])
    assert sys.is_stable
    assert not StateSpace([[1.0]], [[1.0]], [[1.0]]).is_stable
    assert np.array_equal(sys.D, [[0.0]])


def test_a_system_is_a_value():
    A = np.eye(2)
    sys = StateSpace(A, np.ones((2, 1)), np.ones((1, 2)), [[0.0]])
    A[0, 0] = 7.0
    assert sys.A[0, 0] == 1.0
    with pytest.raises(ValueError):
        sys.A[0, 0] = 7.0
    with pytest.raises(AttributeError):
        sys.A = A


ONE = np.ones((1, 1))


@pytest.mark.parametrize(
    "matrices, word",
    [
        ((np.ones((2, 1)), ONE, ONE, ONE), "A must have shape"),
        ((ONE, np.ones((2, 1)), ONE, ONE), "B must have shape"),
        ((ONE, ONE, np.ones((1, 2)), ONE), "C must have shape"),
        ((ONE, ONE, ONE, np.ones((2, 1))), "D must have shape"),
        ((ONE * np.nan, ONE, ONE, ONE), "A must be finite"),
        ((ONE, ONE * np.inf, ONE, ONE), "B must be finite"),
        ((ONE * 1j, ONE, ONE, ONE), "A must be an array of real numbers"),
        (("no", ONE, ONE, ONE), "A must be an array of real numbers"),
        ((ONE, np.ones(1), ONE, ONE), "B must have 2 dimensions"),
        ((ONE, np.ones((1, 0)), ONE, ONE), "at least one input"),
    ],
)
def test_wrong_matrices_are_named(matrices, word):
    with pytest.raises(ValueError, match=word):
        StateSpace(*matrices)


def test_wrong_arguments_are_named():
    sys = random_system(0, 3, 2, 1)
    cases = [
        (lambda: sys.markov(0), "k must be a positive integer"),
        (lambda: sys.markov(2.5), "k must be a positive integer"),
        (lambda: sys.simulate(np.ones((4, 1))), "u must have shape"),
        (lambda: sys.simulate(np.ones((0, 2))), "u must have shape"),
        (lambda: sys.simulate(np.full((4, 2), np.nan)), "u must be finite"),
        (lambda: sys.simulate(np.ones((4, 2)), x0=np.ones(2)), "x0 must have shape"),
        (lambda: sys.transform(np.ones((2, 2))), "T must have shape"),
        (lambda: sys.transform(np.zeros((3, 3))), "T must be invertible"),
        (lambda: series(sys, sys), "second must have m"),
        (lambda: parallel(sys, sys.dual()), "sys2 must have"),
        (lambda: feedback(sys, sys), "controller must have"),
        (lambda: feedback(static_gain(1.0), static_gain(-1.0)), "ill-posed"),
        (lambda: StateSpace(ONE, ONE, ONE).transfer_function(1.0), "z must not be a pole"),
        (lambda: sys.transfer_function(np.nan), "z must be finite"),
    ]
    for call, word in cases:
        with pytest.raises(ValueError, match=word):
            call()


def static_gain(gain):
    return StateSpace(np.zeros((0, 0)), np.zeros((0, 1)), np.zeros((1, 0)), [[gain]])
