"""minimal and similarity: what two realizations of one map share, and what they do not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_systems import (
    change_of_basis,
    jordan_system,
    random_modes,
    random_system,
    relative_error,
    systems,
)

from realization import (
    StateSpace,
    controllable_form,
    minimal,
    modal_form,
    parallel,
    series,
    similarity,
    staircase_form,
)
from realization.decoupling import IllConditionedWarning, _decouple_by_schur, decouple


def redundant_system(seed, n, unreachable, unobservable, m, p, condition):
    """Order n, with that many unreachable and unobservable states, in a basis of that condition."""
    rng = np.random.default_rng(seed)
    kept = n - unreachable - unobservable
    A = rng.standard_normal((n, n))
    hidden = slice(kept, kept + unobservable)
    A[kept + unobservable :, : kept + unobservable] = 0  # nothing drives the unreachable states
    A[:kept, hidden] = 0  # the unobservable states drive no seen state
    A[kept + unobservable :, hidden] = 0
    A *= 0.95 / np.abs(np.linalg.eigvals(A)).max()
    B, C = rng.standard_normal((n, m)), rng.standard_normal((p, n))
    B[kept + unobservable :] = 0
    C[:, hidden] = 0
    sys = StateSpace(A, B, C, rng.standard_normal((p, m)))
    return sys, sys.transform(change_of_basis(rng, n, condition))


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("seed", range(12))
def test_order_forty_with_ten_unreachable_and_five_unobservable_modes(seed, condition):
    ports = np.random.default_rng(seed).integers(1, 4, size=2)
    exact, sys = redundant_system(seed, 40, 10, 5, *ports, condition)
    reduced = minimal(sys)
    assert reduced.n == 25
    # A perturbation of one unit in the last place of sys moves its Markov parameters by about
    # eps condition^2 times the condition of its modes.
    assert relative_error(reduced.markov(50), exact.markov(50)) < 1e-10 * condition**1.5


@pytest.mark.parametrize("modes", ["real", "oscillating"])
def test_order_forty_with_modes_side_by_side(modes):
    rng = np.random.default_rng(0)
    A = np.diag(np.linspace(-0.95, 0.95, 40)) if modes == "real" else random_modes(rng, 40)
    pair = np.r_[A[np.arange(39), np.arange(1, 40)] != 0, False]
    B, C = rng.standard_normal((40, 1)), rng.standard_normal((1, 40))
    ends = [i for i in (10, 15) if not pair[i - 1]] if modes != "real" else [10, 15]
    first = ends[0] if ends else 11
    B[:first], C[0, first : first + 5 + pair[first + 4]] = 0, 0
    lost = first + 5 + pair[first + 4]
    sys = StateSpace(A, B, C, [[0.0]]).transform(change_of_basis(rng, 40, 1e4))
    assert minimal(sys).n == 40 - lost


@settings(max_examples=40, deadline=None)
@given(sys=systems())
def test_a_minimal_system_is_returned_as_it_is(sys):
    assert minimal(sys) is sys


@settings(max_examples=30, deadline=None)
@given(sys=systems(max_order=6, radius=0.95), seed=st.integers(0, 1000))
def test_redundant_interconnections_are_seen(sys, seed):
    T = change_of_basis(np.random.default_rng(seed), 2 * sys.n, 10.0)
    twice = parallel(sys, sys).transform(T)
    reduced = minimal(twice)
    assert reduced.n == sys.n
    assert relative_error(reduced.markov(20), 2 * sys.markov(20)) < 1e-9
    negative = StateSpace(sys.A, sys.B, -sys.C, -sys.D)
    # G - G = 0: in exact arithmetic nothing is left; tol says what counts as nothing.
    assert minimal(parallel(sys, negative), tol=1e-12).n == 0


def test_poles_that_the_kept_and_the_dropped_part_share_spoil_no_refinement():
    # The Newton step for the dropped space has a singular equation here: it must not be taken.
    sys = random_system(2_000_068, 6, 2, 3, radius=0.95)
    rng = np.random.default_rng(68)
    rng.integers((1, 1, 1), (13, 5, 5))
    for _ in range(20):
        twice = parallel(sys, sys).transform(change_of_basis(rng, 12, 10.0))
        reduced = minimal(twice)
        assert reduced.n == 6
        assert relative_error(reduced.markov(20), 2 * sys.markov(20)) < 1e-9


def test_a_pole_cancelled_by_a_zero_goes():
    pole = StateSpace([[0.5]], [[1.0]], [[1.0]], [[0.0]])  # 1 / (z - 1/2)
    zero = StateSpace([[0.2]], [[1.0]], [[-0.3]], [[1.0]])  # (z - 1/2) / (z - 1/5)
    reduced = minimal(series(pole, zero))
    assert reduced.n == 1 and np.isclose(reduced.poles[0], 0.2)


@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_defective_modes_are_cut_where_the_input_enters(condition):
    # In a Jordan block the states below the input are not reached.
    rng = np.random.default_rng(1)
    sys = jordan_system(0.5, 4)
    B = np.zeros((4, 1))
    B[2] = 1.0
    cut = StateSpace(sys.A, B, sys.C, sys.D).transform(change_of_basis(rng, 4, condition))
    assert minimal(cut).n == 3
    whole = sys.transform(change_of_basis(rng, 4, condition))
    assert minimal(whole) is whole


def test_shift_registers_keep_exactly_the_delay():
    # x_20 is written, x_3 is read, 40 cells: a delay of 18 steps needs 18 states.
    A = np.eye(40, k=1)
    sys = StateSpace(A, np.eye(40)[:, [20]], np.eye(40)[[3]], [[0.0]])
    assert minimal(sys).n == 18
    assert minimal(sys.transform(change_of_basis(np.random.default_rng(0), 40, 10.0))).n == 18


@pytest.mark.parametrize("order", [24, 30, 40])
def test_companion_forms_whose_eigenvalues_mean_nothing_are_minimal(order):
    """1 / prod(z - p_i) with close poles p_i: rounding spoils the poles, and the form is robust."""
    A = np.diag(np.ones(order - 1), 1)
    A[-1] = -np.poly(np.linspace(-0.9, 0.9, order))[:0:-1]
    sys = StateSpace(A, np.eye(order)[:, -1:], np.eye(order)[:1])
    assert minimal(sys) is sys
    assert staircase_form(sys)[0].B[1:].any() == 0  # one chain of full length
    assert np.abs(controllable_form(sys)[0].A - A).max() < 1e-10


def test_a_hidden_pair_is_seen_in_a_small_system_in_a_bad_basis():
    """A change of basis of condition 1e4 leaves more than one unit in the last place behind."""
    kept = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        A = np.zeros((3, 3))
        A[:1, :1], A[1:, 1:] = random_modes(rng, 1), random_modes(rng, 2, 0.97)
        sys = StateSpace(A, rng.standard_normal((3, 1)), [[rng.standard_normal(), 0.0, 0.0]])
        kept += minimal(sys.transform(change_of_basis(rng, 3, 1e4))).n > 1
    assert kept <= 1


def test_tol_is_a_relative_perturbation_of_the_data():
    sys = StateSpace(np.diag([0.9, 0.5]), [[1.0], [1e-6]], [[1.0, 1.0]])
    assert minimal(sys).n == 2
    assert minimal(sys, tol=1e-7).n == 2
    assert minimal(sys, tol=1e-5).n == 1


@settings(max_examples=30, deadline=None)
@given(sys=systems(max_order=8))
def test_eigenvectors_and_schur_form_split_a_system_alike(sys):
    fast, slow = decouple(sys.A), _decouple_by_schur(sys.A)
    for blocks in (fast, slow):
        L = np.vstack([b.L for b in blocks])
        V = np.hstack([b.V for b in blocks])
        assert np.allclose(L @ V, np.eye(sys.n), atol=1e-9)
        for b in blocks:
            assert np.allclose(sys.A @ b.V, b.V @ b.A, atol=1e-9 * np.abs(b.V).max())
    key = [sorted((np.round(b.poles, 6) for b in bs), key=str) for bs in (fast, slow)]
    assert len(key[0]) == len(key[1])


@settings(max_examples=60, deadline=None)
@given(sys=systems(), seed=st.integers(0, 1000), condition=st.sampled_from([1.0, 10.0, 1e3]))
def test_similarity_finds_the_change_of_basis(sys, seed, condition):
    T = change_of_basis(np.random.default_rng(seed), sys.n, condition)
    found = similarity(sys, sys.transform(T))
    assert relative_error(found, T) < 1e-9 * condition


@pytest.mark.parametrize("n", [20, 40])
def test_similarity_of_large_systems(n):
    # Single input, single output: O and R are singular to working precision, the modes are not.
    rng = np.random.default_rng(n)
    sys = random_system(n, n, 1, 1)
    T = change_of_basis(rng, n, 100.0)
    assert relative_error(similarity(sys, sys.transform(T)), T) < 1e-6


@pytest.mark.parametrize("size", [2, 4])
def test_similarity_of_defective_and_of_unstable_systems(size):
    rng = np.random.default_rng(0)
    T = change_of_basis(rng, size, 10.0)
    for pole in (0.5, 1.0, 1.7):
        sys = jordan_system(pole, size)
        assert relative_error(similarity(sys, sys.transform(T)), T) < 1e-8


@settings(max_examples=40, deadline=None)
@given(sys=systems(), seed=st.integers(0, 1000), which=st.sampled_from("ABCD"))
def test_similarity_refuses_systems_that_differ_by_a_thousandth(sys, seed, which):
    rng = np.random.default_rng(seed)
    moved = sys.transform(change_of_basis(rng, sys.n, 10.0))
    parts = {name: getattr(moved, name).copy() for name in "ABCD"}
    if which in "BC" and sys.m == sys.p == 1 and sys.n == 1:
        which = "A"  # one state, one channel: B and C alone only rescale each other's gain
    part = parts[which]
    part += 1e-3 * np.linalg.norm(part) * rng.standard_normal(part.shape) / np.sqrt(part.size)
    other = StateSpace(**parts)
    gap = relative_error(other.markov(2 * sys.n + 1), sys.markov(2 * sys.n + 1))
    if gap < 1e-5:
        return  # by chance nearly the same map
    with pytest.raises(ValueError, match="must be equivalent"):
        similarity(sys, other)


def test_similarity_names_what_is_wrong():
    sys = random_system(0, 3, 2, 1)
    redundant = StateSpace(np.diag([0.5, 0.2]), [[1.0], [0.0]], [[1.0, 1.0]])
    for call, word in [
        (lambda: similarity(sys, sys.dual()), "sys2 must have"),
        (lambda: similarity(redundant, redundant), "sys1 must be minimal"),
        (lambda: minimal(sys, tol=0.0), "tol must lie"),
        (lambda: minimal(sys, tol=2.0), "tol must lie"),
    ]:
        with pytest.raises(ValueError, match=word):
            call()


# --- units of the states --------------------------------------------------------------------------


def in_units(sys, d):
    """The system with its states measured in units d, powers of 2: no entry is rounded."""
    d = np.asarray(d, dtype=float)
    return StateSpace(sys.A * d[:, None] / d, sys.B * d[:, None], sys.C / d, sys.D)


units_of_states = st.lists(st.integers(-40, 40), min_size=8, max_size=8)


@settings(max_examples=60)
@given(systems(max_order=8, condition=100.0), units_of_states)
def test_units_of_the_states_change_neither_order_nor_modes(sys, exponents):
    d = 2.0 ** np.array(exponents[: sys.n])
    other = in_units(sys, d)
    assert minimal(other).n == minimal(sys).n == sys.n
    assert relative_error(similarity(sys, other) / d[:, None], np.eye(sys.n)) < 1e-6
    modes, _ = modal_form(other)
    assert relative_error(np.sort(modes.poles), np.sort(sys.poles)) < 1e-9
    assert relative_error(modes.markov(20), sys.markov(20)) < 1e-8


@pytest.mark.parametrize("seed", range(20))
def test_minimal_drops_the_same_states_in_any_units(seed):
    rng = np.random.default_rng(seed)
    B, C = rng.standard_normal((8, 2)), rng.standard_normal((2, 8))
    B[:2], C[:, 2:3] = 0, 0  # two states that no input reaches, one that no output sees
    sys = StateSpace(np.diag(rng.uniform(-0.95, 0.95, 8)), B, C)
    sys = sys.transform(change_of_basis(rng, 8, 1.0))
    reduced = minimal(in_units(sys, 2.0 ** rng.integers(-17, 18, 8)))
    assert reduced.n == 5
    assert relative_error(reduced.markov(20), sys.markov(20)) < 1e-12


def test_two_modes_in_units_fourteen_digits_apart_are_both_kept():
    sys = StateSpace(np.diag([0.5, 0.2]), [[1e7], [1e-7]], [[1e-7, 1e7]])
    assert minimal(sys) is sys
    with pytest.warns(IllConditionedWarning):  # T holds the units: cond(T) is about 1e14
        form, _ = controllable_form(sys)
    assert form.allclose(StateSpace([[0, 1], [-0.1, 0.7]], [[0], [1]], [[-0.7, 2]]))


@pytest.mark.parametrize("noise", [1e-17, 1e-15])
def test_rounding_errors_are_not_taken_for_states_in_small_units(noise):
    sys = StateSpace(np.diag([0.5, 0.2]), [[1.0], [noise]], [[1.0, 1.0]])
    assert minimal(sys).n == minimal(sys.dual()).n == 1


def test_a_jordan_block_in_other_units_keeps_its_coupling():
    sys = in_units(jordan_system(0.5, 2), 2.0 ** np.array([20, -20]))
    with pytest.warns(IllConditionedWarning, match="cannot be split"):
        form, _ = modal_form(sys)
    assert relative_error(form.markov(20), sys.markov(20)) < 1e-12


def test_systems_without_state_are_similar_when_their_feedthroughs_agree():
    gain = StateSpace(np.zeros((0, 0)), np.zeros((0, 1)), np.zeros((1, 0)), [[2.0]])
    assert similarity(gain, gain).shape == (0, 0)
    with pytest.raises(ValueError, match="must be equivalent"):
        similarity(gain, StateSpace(gain.A, gain.B, gain.C, [[3.0]]))
