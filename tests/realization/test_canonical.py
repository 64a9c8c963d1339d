"""Canonical forms: the structure each promises, sys.transform(T) = form, and honest limits."""

from __future__ import annotations

import warnings

import control
import mpmath
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_systems import change_of_basis, jordan_system, random_system, relative_error, systems

from realization import (
    IllConditionedWarning,
    StateSpace,
    balanced_form,
    controllable_form,
    hankel_singular_values,
    modal_form,
    observability_gramian,
    observable_form,
    parallel,
    reachability_gramian,
    staircase_form,
)

FORMS = (controllable_form, observable_form, modal_form, balanced_form, staircase_form)


def balanceable(sys):
    """Whether the smallest Hankel singular value is more than a rounding error of the largest."""
    sigma = hankel_singular_values(sys)
    return sigma[-1] > 1e-13 * sigma[0]


def quietly(form, sys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IllConditionedWarning)
        return form(sys)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(sys=systems())
def test_the_change_of_basis_leads_to_the_form(form, sys):
    assume(form is not balanced_form or balanceable(sys))
    result, T = quietly(form, sys)
    condition = np.linalg.cond(T)
    moved = sys.transform(T)
    for name in "ABCD":
        a, b = getattr(moved, name), getattr(result, name)
        # A T, T^-1 pair of that condition cannot be applied more precisely than this.
        assert np.abs(a - b).max() < 1e-13 * condition * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(sys=systems())
def test_the_form_has_the_same_markov_parameters(form, sys):
    assume(form is not balanced_form or balanceable(sys))
    result, T = quietly(form, sys)
    assert relative_error(result.markov(30), sys.markov(30)) < 1e-12 * max(100, np.linalg.cond(T))


@settings(max_examples=40, deadline=None)
@given(sys=systems(max_ports=1))
def test_companion_form_holds_the_characteristic_polynomial(sys):
    result, T = quietly(controllable_form, sys)
    n = sys.n
    assert np.array_equal(result.A[:-1], np.eye(n, k=1)[:-1])
    assert np.array_equal(result.B, np.eye(n)[:, -1:])
    coefficients = np.poly(sys.poles).real[:0:-1]
    scale = np.abs(coefficients).max()
    assert np.abs(result.A[-1] + coefficients).max() < 1e-13 * np.linalg.cond(T) * scale


@settings(max_examples=40, deadline=None)
@given(sys=systems())
def test_controllable_form_has_one_chain_for_each_kronecker_index(sys):
    result, _ = quietly(controllable_form, sys)
    shifts = np.eye(sys.n, k=1)
    last = [i for i in range(sys.n) if i == sys.n - 1 or not np.array_equal(result.A[i], shifts[i])]
    inner = [i for i in range(sys.n) if i not in last]
    # Generic inputs share the states as evenly as possible, the first inputs getting the rest.
    lengths = np.diff([-1, *last])
    q, r = divmod(sys.n, sys.m)
    expected = [q + (j < r) for j in range(sys.m) if q + (j < r)]
    assert sorted(lengths, reverse=True) == expected
    assert not result.B[inner].any()
    for chain, i in enumerate(last):
        assert result.B[i, chain] == 1.0


@settings(max_examples=30, deadline=None)
@given(sys=systems())
def test_observable_form_is_the_transposed_form_of_the_dual(sys):
    result, _ = quietly(observable_form, sys)
    dual, _ = quietly(controllable_form, sys.dual())
    assert result.allclose(dual.dual(), rtol=0, atol=0)


def test_companion_form_against_forty_digits():
    sys = random_system(7, 5, 1, 1, condition=2.0)
    result, T = controllable_form(sys)
    with mpmath.workdps(40):
        A, b, c = (mpmath.matrix(X.tolist()) for X in (sys.A, sys.B, sys.C))
        R = mpmath.matrix(5, 5)
        column = b
        for k in range(5):
            R[:, k] = column
            column = A * column
        q = (mpmath.inverse(R))[4, :]
        rows = []
        for _ in range(5):
            rows.append(q)
            q = q * A
        T_exact = mpmath.matrix([[r[0, j] for j in range(5)] for r in rows])
        A_exact = T_exact * A * mpmath.inverse(T_exact)
        C_exact = c * mpmath.inverse(T_exact)
        T_exact, A_exact, C_exact = (
            np.array(X.tolist(), dtype=float) for X in (T_exact, A_exact, C_exact)
        )
    assert relative_error(T, T_exact) < 1e-12
    assert relative_error(result.A, A_exact) < 1e-12
    assert relative_error(result.C, C_exact) < 1e-12


def test_a_long_companion_form_warns_with_its_condition_number():
    sys = random_system(0, 14, 1, 1, radius=0.9)
    with pytest.warns(IllConditionedWarning, match=r"condition number \d"):
        result, T = controllable_form(sys)
    assert np.linalg.cond(T) > 1e8
    # Where python-control's reachable_form raises or is off by 5e-3, the form still carries the
    # poles to what its condition number allows.
    assert np.array_equal(result.A[:-1], np.eye(14, k=1)[:-1])
    assert relative_error(result.markov(20), sys.markov(20)) < 1e-14 * np.linalg.cond(T)


def test_well_conditioned_forms_do_not_warn():
    sys = random_system(2, 3, 1, 1, radius=0.9, condition=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in FORMS:
            form(sys)


@settings(max_examples=40, deadline=None)
@given(sys=systems())
def test_modal_form_is_block_diagonal_with_one_block_a_mode(sys):
    result, _ = modal_form(sys)
    A = result.A.copy()
    moduli, i = [], 0
    while i < sys.n:
        if i + 1 < sys.n and A[i, i + 1] != 0:
            assert A[i, i] == A[i + 1, i + 1] and A[i, i + 1] == -A[i + 1, i] and A[i, i + 1] > 0
            moduli.append(np.hypot(A[i, i], A[i, i + 1]))
            A[i : i + 2, i : i + 2] = 0
            i += 2
        else:
            moduli.append(abs(A[i, i]))
            A[i, i] = 0
            i += 1
    assert not A.any()
    assert all(np.diff(moduli) <= 1e-12)
    assert np.allclose(result.poles, sys.poles, atol=1e-9)


def test_modal_form_of_a_repeated_pole_that_can_be_split_is_diagonal():
    rng = np.random.default_rng(0)
    A = np.diag([0.5, 0.5, 0.5, -0.3])
    sys = StateSpace(A, rng.standard_normal((4, 3)), rng.standard_normal((3, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result, T = modal_form(sys.transform(change_of_basis(rng, 4, 10.0)))
    assert np.allclose(result.A, np.diag([0.5, 0.5, 0.5, -0.3]), atol=1e-13)
    assert np.count_nonzero(result.A) == 4
    assert np.linalg.cond(T) < 100


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("pole", [0.5, -0.9, 0.0])
def test_modal_form_says_that_a_jordan_block_cannot_be_split(size, pole):
    rng = np.random.default_rng(size)
    jordan = jordan_system(pole, size)
    other = StateSpace(np.diag([0.2, 0.7]), np.ones((2, 1)), np.ones((1, 2)))
    T = change_of_basis(rng, size + 2, 10.0)
    sys = parallel(jordan, other).transform(T)
    with pytest.warns(IllConditionedWarning, match=f"{size} poles near"):
        result, T = modal_form(sys)
    # The mode next to it is split off, and nothing was paid for it in digits.
    assert np.linalg.cond(T) < 1e4
    assert relative_error(result.markov(20), sys.markov(20)) < 1e-11
    assert sorted(np.round(np.diag(result.A), 3))[-1] == 0.7


@settings(max_examples=40, deadline=None)
@given(sys=systems(radius=0.99))
def test_balanced_form_has_equal_diagonal_gramians(sys):
    assume(balanceable(sys))
    result, _ = balanced_form(sys)
    sigma = np.diag(hankel_singular_values(sys))
    # The smallest singular values carry the largest relative error.
    for gramian in (reachability_gramian(result), observability_gramian(result)):
        assert np.abs(gramian - sigma).max() < 1e-9 * sigma[0, 0]


@settings(max_examples=30, deadline=None)
@given(sys=systems(), lost=st.integers(0, 4), seed=st.integers(0, 1000))
def test_staircase_form_is_orthogonal_and_cuts_off_what_is_not_reached(sys, lost, seed):
    rng = np.random.default_rng(seed)
    n = sys.n
    A = np.zeros((n + lost, n + lost))
    A[:n, :n], A[:n, n:] = sys.A, rng.standard_normal((n, lost))
    A[n:, n:] = np.diag(rng.uniform(1.1, 1.9, lost))
    B = np.vstack([sys.B, np.zeros((lost, sys.m))])
    C = np.hstack([sys.C, rng.standard_normal((sys.p, lost))])
    whole = StateSpace(A, B, C, sys.D).transform(change_of_basis(rng, n + lost, 5.0))
    result, T = staircase_form(whole)
    assert np.allclose(T @ T.T, np.eye(n + lost), atol=1e-13)
    assert not result.A[n:, :n].any() and not result.B[n:].any()
    assert relative_error(whole.transform(T).A, result.A) < 1e-11
    assert np.allclose(sorted(result.poles.real)[n:], sorted(np.diag(A)[n:]), atol=1e-8)
    # Block Hessenberg: nothing below the staircase, whose blocks are at most m wide and high.
    for column in range(n):
        assert not result.A[min(n, column + 2 * sys.m) : n, column].any()


def test_what_a_form_cannot_do_is_refused():
    unreachable = StateSpace(np.diag([0.5, 0.2]), [[1.0], [0.0]], [[1.0, 1.0]])
    unstable = StateSpace([[1.5]], [[1.0]], [[1.0]])
    empty = StateSpace(np.zeros((0, 0)), np.zeros((0, 1)), np.zeros((1, 0)), [[1.0]])
    for call, word in [
        (lambda: controllable_form(unreachable), "must be reachable.*1 of 2 modes see no input"),
        (lambda: observable_form(unreachable.dual()), "must be observable.*no output"),
        (lambda: controllable_form(empty), "n >= 1"),
        (lambda: balanced_form(unstable), "must be stable"),
        (lambda: balanced_form(unreachable), "at least 2 Hankel singular values"),
    ]:
        with pytest.raises(ValueError, match=word):
            call()
    assert staircase_form(empty)[0].n == 0
    assert modal_form(empty)[0].n == 0
    assert modal_form(unstable)[0].n == 1


def test_python_control_loses_what_this_form_keeps():
    # An independent reference where it is right (n = 3), and its error grown at n = 12.
    small = random_system(4, 3, 1, 1, condition=2.0)
    theirs = control.reachable_form(control.ss(small.A, small.B, small.C, small.D, True))[0]
    ours, _ = controllable_form(small)
    # Their convention: coefficients in the first row, highest power first.
    assert np.allclose(theirs.A[0], ours.A[-1][::-1], atol=1e-9)
    assert np.allclose(theirs.C[0], ours.C[0][::-1], atol=1e-9)


@pytest.mark.parametrize("unit", [1.0, 1e-11, 1e-12, 1e12])
def test_controllable_and_observable_form_in_any_units_of_inputs_and_outputs(unit):
    sys = StateSpace([[0.5, 0.1], [0, 0.3]], [[1, 0], [0, unit]], [[1.0, 1]])
    expected = StateSpace([[0.5, 0.1 * unit], [0, 0.3]], np.eye(2), [[1.0, unit]])
    found, T = quietly(controllable_form, sys)
    assert found.allclose(expected, atol=1e-10 * unit)
    assert pytest.approx(np.diag([1, 1 / unit])) == T
    assert quietly(observable_form, sys.dual())[0].allclose(expected.dual(), atol=1e-10 * unit)
