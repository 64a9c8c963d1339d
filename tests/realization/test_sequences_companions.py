"""The causal window form is the same system; the frozen form is not, unless nothing varies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_weights import random_attention, random_selective

from realization.sequences import (
    LinearTrajectory,
    WindowedScan,
    block_companion,
    channel_trajectory,
    frozen_form,
    linear_attention_fir,
    nilpotency_index,
    selective_scan,
    sensitivity,
    state_size,
    time_invariant,
    window_form,
)


def random_trajectory(l: int, n: int, m: int, p: int, seed: int) -> LinearTrajectory:
    rng = np.random.default_rng(seed)
    A = np.linalg.qr(rng.normal(size=(l, n, n)))[0] * rng.uniform(0.6, 1.1, size=(l, 1, n))
    shapes = ((l, n, m), (l, p, n), (l, p, m))
    return LinearTrajectory(A, *(rng.normal(size=shape) for shape in shapes))


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.integers(0, 2), st.integers(0))
def test_window_form_is_the_same_system(n, m, p, extra, seed):
    system = random_trajectory(18, n, m, p, seed)
    form = window_form(system, blocks=-(-n // p) + extra)  # a longer window is a state too
    rng = np.random.default_rng(seed + 1)
    v = rng.normal(size=(18, m))
    y = system.run(v, rng.normal(size=n)).y
    k = form.start
    run = form.system.run(v[k:], form.state(v[:k], y[:k]))
    np.testing.assert_allclose(run.y, y[k:], atol=1e-8 * max(1, np.abs(y).max()))
    # its state never is anything but the window itself
    np.testing.assert_allclose(run.x[-1], form.state(v, y), atol=1e-8 * max(1, np.abs(y).max()))


def test_window_form_has_the_papers_shape():
    system = random_trajectory(14, 3, 1, 1, seed=0)
    form = window_form(system)
    A, B = form.system.A, form.system.B
    assert A.shape[1:] == (6, 6)  # twice the order
    assert np.array_equal(A[:, :4], np.broadcast_to(np.eye(6, k=2)[:4], (11, 4, 6)))
    assert not B[:, :4].any() and (B[:, 4] == 1).all()
    assert np.abs(A[:, 5]).min() > 0  # a full last row


def test_window_form_needs_neither_reachability_nor_an_inverse():
    system = random_trajectory(14, 3, 1, 1, seed=1)
    A, B = system.A.copy(), np.zeros_like(system.B)
    A[6, :, 0] = 0
    lost = LinearTrajectory(A, B, system.C, system.D)
    form, v = window_form(lost), np.ones((14, 1))
    y = lost.run(v, np.ones(3)).y
    np.testing.assert_allclose(form.system.run(v[3:], form.state(v[:3], y[:3])).y, y[3:], atol=1e-9)


def test_window_form_is_causal():
    """Its last row at t is a function of u_{t-n} .. u_t, each of them, bit for bit."""
    n, weights = 3, random_selective(e=4, n=3, r=2, seed=2)
    u = np.random.default_rng(2).normal(size=(16, 4))

    def coefficients(u):
        system = window_form(channel_trajectory(weights, u, 1)).system
        return np.concatenate([system.A[:, -1], system.B[:, -1], system.D[:, 0]], axis=1)

    change = sensitivity(coefficients, u)
    for row, t in enumerate(range(n, 16)):
        assert set(np.nonzero(change[row])[0]) == set(range(t - n, t + 1))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_window_form_of_the_selective_scan(n):
    weights = random_selective(e=4, n=n, r=2, seed=n)
    u = np.random.default_rng(n).normal(size=(60, 4))
    system, v = channel_trajectory(weights, u, 0), u[:, :1]
    y, form = system.run(v).y, window_form(system)
    run = form.system.run(v[n:], form.state(v[:n], y[:n]))
    np.testing.assert_allclose(run.y, y[n:], atol=1e-9)


@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (2, 2), (2, 5), (3, 6)])
def test_windowed_scan_is_the_scan(n, blocks):
    """As the text is read, from its first token on, and from any carried state."""
    weights, u = random_selective(e=3, n=n, r=2, seed=20 + n), np.random.default_rng(n)
    u = u.normal(size=(28, 3))
    system = WindowedScan(weights, blocks)
    run = system.run(u)
    np.testing.assert_allclose(run.y, selective_scan(weights).run(u).y, atol=1e-9)
    assert state_size(system) == blocks * 7
    expected = np.hstack([u[-blocks:], run.y[-blocks:], np.ones((blocks, 1))])
    assert np.array_equal(run.x[-1], expected.reshape(-1))
    for cut in (1, blocks, 17):
        first = system.run(u[:cut])
        assert np.array_equal(system.run(u[cut:], first.x[-1]).y, run.y[cut:])


def gated(amplitude: float, l: int = 80) -> tuple[LinearTrajectory, np.ndarray]:
    """Two real poles whose step varies by a factor e^{+-amplitude} from token to token."""
    rng = np.random.default_rng(3)
    delta = 0.5 * np.exp(amplitude * rng.normal(size=l))
    A = np.exp(-delta[:, None] * [1.0, 3.0])[:, :, None] * np.eye(2)
    B, C = delta[:, None, None] * np.ones((l, 2, 1)), np.repeat([[[1.0, -2.0]]], l, axis=0)
    return LinearTrajectory(A, B, C, np.zeros((l, 1, 1))), rng.normal(size=(l, 1))


def frozen_error(amplitude: float) -> float:
    system, v = gated(amplitude)
    y, wrong = system.run(v).y, frozen_form(system).run(v).y
    return float(np.linalg.norm(wrong - y) / np.linalg.norm(y))


def test_frozen_form_is_exact_for_constant_coefficients():
    assert frozen_error(0.0) < 1e-12
    rng = np.random.default_rng(4)
    A, B = 0.5 * np.linalg.qr(rng.normal(size=(6, 6)))[0], rng.normal(size=(6, 2))
    system = time_invariant(A, B, rng.normal(size=(3, 6)), rng.normal(size=(3, 2)), 30)
    v = rng.normal(size=(30, 2))
    np.testing.assert_allclose(frozen_form(system).run(v).y, system.run(v).y, atol=1e-9)


def test_frozen_form_is_another_system_when_coefficients_vary():
    """The error starts with the first order of the variation: matched poles, another map."""
    system, _ = gated(0.5)
    frozen = frozen_form(system)
    for t in range(len(system)):
        poles = (np.sort(np.linalg.eigvals(s.A[t])) for s in (system, frozen))
        np.testing.assert_allclose(*poles, atol=1e-9)  # the poles do match, at each t
    assert frozen_error(0.5) > 0.1
    small, smaller = frozen_error(1e-3), frozen_error(1e-4)
    assert abs(small / smaller - 10) < 0.2


def test_frozen_form_can_be_unstable_where_the_system_is_not():
    """Two tokens in turn, poles (0.9, 0.8) and (-0.9, -0.8): each stable, their companions not."""
    l = 60
    poles = np.where(np.arange(l)[:, None] % 2, [0.9, 0.8], [-0.9, -0.8])
    A = poles[:, :, None] * np.eye(2)
    shape = (np.ones((l, 2, 1)), np.repeat([[[1.0, -0.5]]], l, axis=0), np.zeros((l, 1, 1)))
    system = LinearTrajectory(A, *shape)
    impulse = np.eye(l, 1)
    assert np.abs(system.run(impulse).y[-2:]).max() < 1e-1
    assert np.abs(frozen_form(system).run(impulse).y[-2:]).max() > 1e3


def test_zero_last_row_is_the_register_of_attention():
    weights = random_attention(4, 1, 1, 2, seed=5)
    register = linear_attention_fir(weights, 6)
    form = block_companion(
        width=4,
        blocks=5,
        last_row=lambda u: np.zeros((4, 20)),
        write=lambda u: register.b(u)[-4:, None],
        rho=register.rho,
        C=register.C,
    )
    u = np.random.default_rng(5).normal(size=(15, 4))
    np.testing.assert_allclose(form.run(u).y, register.run(u).y, atol=0)
    assert nilpotency_index(form, u) == 5


def test_constant_last_row_is_fading_memory():
    """The characteristic polynomial of diag(.9, .5) below the identities: its impulse response."""
    c = np.array([0.3, -1.0])
    form = block_companion(
        width=1,
        blocks=2,
        last_row=lambda u: np.array([[-0.45, 1.4]]),
        write=lambda u: u[:, None],
        rho=lambda u, x: x @ c[:, None],
        C=lambda u, x: c[None],
    )
    u = np.zeros((20, 1))
    u[0] = 1
    y = form.run(u).y[:, 0]
    k = np.arange(19)
    # c_1 z_1 + c_2 z_2 with z_2 the response (.9^{k+1} - .5^{k+1}) / .4 and z_1 one step before
    z2, z1 = (0.9 ** (k + 1) - 0.5 ** (k + 1)) / 0.4, (0.9**k - 0.5**k) / 0.4
    np.testing.assert_allclose(y[1:], c[0] * z1 + c[1] * z2, atol=1e-14)
    assert nilpotency_index(form, u) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: window_form(s, 0), "blocks must be between 1 and 11"),
        (lambda s: window_form(s, 12), "blocks must be between 1 and 11"),
        (lambda s: window_form(s).state(np.ones((2, 1)), np.ones((3, 1))), "3 past steps needed"),
        (
            lambda s: window_form(LinearTrajectory(s.A, s.B, 0 * s.C, s.D)),
            "not observable in 3 steps at t=0",
        ),
        (lambda s: window_form(s, 2), "not observable in 2 steps at t=0.* has rank 2 of 3"),
        (lambda s: frozen_form(random_trajectory(12, 3, 2, 1, seed=6)), "multiple of m; got n=3"),
        (
            lambda s: frozen_form(LinearTrajectory(s.A, 0 * s.B, s.C, s.D)),
            "frozen at t=0 is not reachable",
        ),
        (lambda s: WindowedScan(random_selective(2, 3, 1, 0), 2), "blocks must be at least 3"),
        (lambda s: block_companion(0, 1, None, None, None, None), "at least 1"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(random_trajectory(12, 3, 1, 1, seed=6))
