"""The input-varying form itself: running, splitting, series, and its ranks on hand-made systems."""

import numpy as np
import pytest

from realization.sequences import (
    InputVaryingSystem,
    Series,
    Wrapped,
    nilpotency_index,
    observability_matrix,
    observable_rank,
    reachability_matrix,
    reachable_rank,
    state_size,
    transition,
)


def two_state(u_scales: float = 1.0) -> InputVaryingSystem:
    """x_{t+1} = [[u_1, 1], [0, u_2]] x + [0, u_1], y = x_1 + u_1 x_2."""
    return InputVaryingSystem(
        n=2,
        A=lambda u: np.array([[u[0] * u_scales, 1.0], [0.0, u[1] * u_scales]]),
        b=lambda u: np.array([0.0, u[0]]),
        rho=lambda u, x: np.array([x[0] + u[0] * x[1]]),
        B=lambda u: np.array([[0.0, 0.0], [1.0, 0.0]]),
        C=lambda u, x: np.array([[1.0, u[0]]]),
    )


def test_three_steps_by_hand():
    run = two_state().run([[2.0, 3.0], [-1.0, 0.5], [4.0, 1.0]], [1.0, -1.0])
    np.testing.assert_array_equal(run.x, [[1, -1], [1, -1], [-2, -1.5], [-9.5, 2.5]])
    np.testing.assert_array_equal(run.y[:, 0], [-1, 2, -8])


def test_any_split_carries_the_state_exactly():
    u = np.random.default_rng(0).normal(size=(20, 2))
    system = Series((two_state(), Wrapped(two_state(0.5), lambda y: np.tile(y, 2), np.add)))
    whole = system.run(u)
    for cut in range(1, 20):
        first = system.run(u[:cut])
        second = system.run(u[cut:], first.x[-1])
        assert np.array_equal(np.vstack([first.y, second.y]), whole.y)
        assert np.array_equal(second.x[-1], whole.x[-1])


def test_series_is_one_after_the_other():
    u = np.random.default_rng(1).normal(size=(15, 2))
    first = two_state()
    second = Wrapped(two_state(0.5), lambda y: np.array([y[0], 1.0]), lambda y, z: y + z)
    middle = first.run(u).y
    joint = Series((first, second)).run(u)
    assert np.array_equal(joint.y, second.run(middle).y)
    assert state_size(Series((first, second))) == 4 == state_size(second) + state_size(first)
    x1, x2 = Series((first, second)).split(joint.x[7])
    assert np.array_equal(x1, first.run(u).x[7]) and np.array_equal(x2, second.run(middle).x[7])


def test_transition_is_the_product_newest_first():
    u = np.random.default_rng(2).normal(size=(6, 2))
    A = [two_state().A(token) for token in u]
    np.testing.assert_allclose(transition(two_state(), u, 1, 4), A[3] @ A[2] @ A[1], atol=1e-14)
    assert np.array_equal(transition(two_state(), u, 3, 3), np.eye(2))


def test_matrices_against_their_definition():
    u = np.random.default_rng(3).normal(size=(8, 2))
    s = two_state()
    A, B = [s.A(t) for t in u], [s.B(t) for t in u]
    C = [s.C(t, np.zeros(2)) for t in u]
    R = np.hstack([B[4], A[4] @ B[3], A[4] @ A[3] @ B[2]])
    np.testing.assert_allclose(reachability_matrix(s, u, t=5, steps=3), R, atol=1e-14)
    O = np.vstack([C[2], C[3] @ A[2], C[4] @ A[3] @ A[2]])
    np.testing.assert_allclose(observability_matrix(s, u, t=2, steps=3), O, atol=1e-14)


def test_rank_grows_with_the_stretch_of_tokens():
    u = np.random.default_rng(4).normal(size=(8, 2))
    assert [reachable_rank(two_state(), u, 5, k) for k in (1, 2, 3)] == [1, 2, 2]
    assert [observable_rank(two_state(), u, 2, k) for k in (1, 2, 3)] == [1, 2, 2]


def test_input_varying_nilpotency():
    """Products along the sequence decide: here every A(u) is nilpotent and the system is not."""
    up, down = np.eye(2, k=1), np.eye(2, k=-1)
    system = InputVaryingSystem(
        n=2, A=lambda u: up if u[0] > 0 else down, b=lambda u: np.zeros(2),
        rho=lambda u, x: x, B=lambda u: np.eye(2), C=lambda u, x: np.eye(2),
    )  # fmt: skip
    assert nilpotency_index(system, np.ones((6, 1))) == 2
    assert nilpotency_index(system, -np.ones((6, 1))) == 2
    assert nilpotency_index(system, [[1.0], [-1.0], [1.0], [-1.0]]) is None
    # too short a sequence shows nothing: one product of one token is not zero
    assert nilpotency_index(system, [[1.0]]) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, u: s.run(u[0]), "u must have shape"),
        (lambda s, u: s.run(u, np.ones(3)), r"x0 must have shape \(2,\)"),
        (lambda s, u: s.run(u + 1j), "u must be real"),
        (lambda s, u: s.run(u, np.ones(2) * 1j), "x0 must be an array of real"),
        (lambda s, u: transition(s, u, 3, 2), "start <= stop"),
        (lambda s, u: reachability_matrix(s, u, 2, 3), "steps <= t"),
        (lambda s, u: observability_matrix(s, u, 6, 3), "t <= 8 - steps"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(two_state(), np.ones((8, 2)))
