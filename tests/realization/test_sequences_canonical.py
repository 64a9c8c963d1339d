"""Exact canonical forms of input-varying systems: planted answers, closed forms, who is causal."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sequence_weights import random_selective

from realization.sequences import (
    FORMS,
    LinearTrajectory,
    channel_trajectory,
    companion_column,
    controller_form,
    dependence,
    is_causal,
    observability_form,
    reachability_form,
    selective_scan,
    sensitivity,
    time_invariant,
    time_reversed,
)


def well_conditioned(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    """Random invertible matrices (count, n, n), condition number at most 4."""
    left, right = (np.linalg.qr(rng.normal(size=(count, n, n)))[0] for _ in range(2))
    return left * rng.uniform(0.5, 2.0, size=(count, 1, n)) @ right


def planted_controller(l: int, N: int, m: int, p: int, seed: int):
    """A system made from known companions: T_{t+1}^{-1} F_t T_t, T_{t+1}^{-1} e_N, and T, F."""
    rng, n = np.random.default_rng(seed), N * m
    F = np.repeat(np.eye(n, k=m)[None], l, axis=0)
    F[:, -m:] = rng.normal(size=(l, m, n)) * 0.4
    T = well_conditioned(rng, l + 1, n)
    A = np.linalg.solve(T[1:], F @ T[:-1])
    B = np.linalg.solve(T[1:], np.eye(n)[None, :, -m:])
    C, D = rng.normal(size=(l, p, n)), rng.normal(size=(l, p, m))
    return LinearTrajectory(A, B, C, D), T, F, rng


def random_trajectory(l: int, n: int, m: int, p: int, seed: int) -> LinearTrajectory:
    """Well-conditioned random A_t and Gaussian B_t, C_t, D_t."""
    rng = np.random.default_rng(seed)
    A = 0.8 * well_conditioned(rng, l, n)
    return LinearTrajectory(
        A, rng.normal(size=(l, n, m)), rng.normal(size=(l, p, n)), rng.normal(size=(l, p, m))
    )


def global_solve(system: LinearTrajectory, v: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """Outputs by one linear system for all states at once: no recursion."""
    l, n = len(system), system.n
    shift = np.zeros(((l + 1) * n, (l + 1) * n))
    for t, A in enumerate(system.A):
        shift[(t + 1) * n : (t + 2) * n, t * n : (t + 1) * n] = A
    forcing = np.concatenate([x0, np.einsum("tij,tj->ti", system.B, v).reshape(-1)])
    x = np.linalg.solve(np.eye(len(shift)) - shift, forcing).reshape(l + 1, n)
    return np.einsum("tij,tj->ti", system.C, x[:-1]) + np.einsum("tij,tj->ti", system.D, v)


orders = st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2**16))


# -- the controller form ------------------------------------------------------------------------


@settings(max_examples=30)
@given(orders)
def test_controller_form_recovers_planted_companions(size):
    """Theorem 1: there is exactly one, so what was planted must come back."""
    N, m, p, seed = size
    system, T, F, _ = planted_controller(2 * N + 8, N, m, p, seed)
    form = controller_form(system)
    assert (form.start, form.stop) == (N, N + 9)
    np.testing.assert_allclose(form.T, T[form.start : form.stop + 1], atol=1e-9)
    np.testing.assert_allclose(form.system.A, F[form.start : form.stop], atol=1e-9)


@settings(max_examples=30)
@given(orders)
def test_controller_form_is_a_companion_and_keeps_the_map(size):
    N, m, p, seed = size
    system, *_, rng = planted_controller(2 * N + 12, N, m, p, seed)
    form, n = controller_form(system), N * m
    inside = slice(form.start, form.stop)
    companion = form.T[1:] @ system.A[inside] @ np.linalg.inv(form.T[:-1])
    above = np.broadcast_to(np.eye(n, k=m)[:-m], companion[:, :-m].shape)
    np.testing.assert_allclose(companion[:, :-m], above, atol=1e-9)
    unit = np.broadcast_to(np.eye(n)[:, -m:], system.B[inside].shape)
    np.testing.assert_allclose(form.T[1:] @ system.B[inside], unit, atol=1e-9)
    v, x0 = rng.normal(size=(len(system), m)), rng.normal(size=n)
    y = global_solve(system, v, x0)
    x = system.run(v, x0).x[form.start]
    np.testing.assert_allclose(form.run(v[inside], x), y[inside], atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_selective_scan_in_controller_form_keeps_its_map(n):
    """The diagonal, input-varying case the paper leaves out, on random tokens."""
    weights = random_selective(e=6, n=n, r=2, seed=n)
    u = np.random.default_rng(n).normal(size=(60, 6))
    expected = selective_scan(weights).run(u).y
    for channel in range(6):
        system, v = channel_trajectory(weights, u, channel), u[:, channel : channel + 1]
        form = controller_form(system)
        x = system.run(v).x[form.start]
        y = form.run(v[form.start : form.stop], x)[:, 0]
        np.testing.assert_allclose(y, expected[form.start : form.stop, channel], atol=1e-9)


def diagonal_of_order_two(l: int, seed: int):
    """A_t = diag(p_t, q_t), B = (1, 1), random C; and p, q, p - q."""
    rng = np.random.default_rng(seed)
    p, q = rng.uniform(0.5, 0.95, size=l), rng.uniform(0.05, 0.45, size=l)
    A = np.stack([p, q], axis=1)[:, :, None] * np.eye(2)
    C = rng.normal(size=(l, 1, 2))
    return LinearTrajectory(A, np.ones((l, 2, 1)), C, np.zeros((l, 1, 1))), p, q, p - q


def test_order_two_by_hand():
    """a_1(t) = -p_t q_t d_{t-1}/d_t and a_2(t) = (p_{t+1} p_t - q_{t+1} q_t) / d_{t+1}."""
    system, p, q, d = diagonal_of_order_two(20, seed=0)
    form = controller_form(system)
    t = np.arange(form.start, form.stop)
    expected = [-p[t] * q[t] * d[t - 1] / d[t], (p[t + 1] * p[t] - q[t + 1] * q[t]) / d[t + 1]]
    np.testing.assert_allclose(form.system.A[:, -1], np.transpose(expected), atol=1e-12)


@settings(max_examples=30)
@given(orders)
def test_last_row_is_the_causal_column_read_along_a_diagonal(size):
    """Theorem 2: a_i(t) = alpha_i(t + i - 1), block by block."""
    N, m, _, seed = size
    system, *_ = planted_controller(3 * N + 6, N, m, 1, seed)
    form = controller_form(system)
    for t in range(form.start, form.stop):
        for i in range(1, N + 1):
            a_i = form.system.A[t - form.start, -m:, (i - 1) * m : i * m]
            alpha = companion_column(system, t + i - 1)[(i - 1) * m : i * m]
            np.testing.assert_allclose(a_i, alpha, atol=1e-8)


def test_alpha_is_the_last_column_of_the_reachability_form():
    system = random_trajectory(20, 4, 2, 1, seed=1)
    form = reachability_form(system)
    for t in range(form.start, form.stop):
        alpha = form.system.A[t - form.start, :, -2:]
        np.testing.assert_allclose(alpha, companion_column(system, t), atol=1e-10)


def selective_coefficients(form, weights, channel=0):
    """u -> A~_t, B~_t, C~_t flattened, for the form of one channel of a scan."""

    def coefficients(u):
        s = form(channel_trajectory(weights, u, channel)).system
        return np.hstack([x.reshape(len(s), -1) for x in (s.A, s.B, s.C)])

    return coefficients


@pytest.mark.parametrize("n", [2, 3, 4])
def test_each_coefficient_depends_on_exactly_its_own_tokens(n):
    """a_i(t) depends on u_{t-n+i-1} .. u_{t+i-1}: all of them, and on nothing else."""
    weights = random_selective(e=5, n=n, r=2, seed=n)
    u = np.random.default_rng(n).normal(size=(3 * n + 4, 5))
    for i in range(1, n + 1):

        def a_i(u, i=i):
            return controller_form(channel_trajectory(weights, u, 0)).system.A[:, -1, i - 1]

        change = sensitivity(a_i, u)
        for row, t in enumerate(range(n, n + len(change))):
            depends = set(range(t - n + i - 1, t + i))
            assert set(np.nonzero(change[row])[0]) >= depends
            others = sorted(set(range(len(u))) - depends)
            assert change[row, others].max() < 1e-8 * change[row].max() + 1e-9
            assert change[row, sorted(depends)].min() > 1e-6 * change[row].max()


def test_order_four_needs_u_from_t_minus_4_to_t_plus_3():
    weights = random_selective(e=5, n=4, r=2, seed=4)
    u = np.random.default_rng(4).normal(size=(18, 5))
    change = sensitivity(selective_coefficients(controller_form, weights), u)
    used = np.nonzero(change[5] > 1e-6)[0] - (4 + 5)
    assert (used.min(), used.max()) == (-4, 3)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_dependence_of_every_form(name, n):
    """First and last token of the table are used, tokens outside never."""
    weights = random_selective(e=4, n=n, r=2, seed=10 + n)
    u = np.random.default_rng(10 + n).normal(size=(4 * n + 5, 4))
    form = FORMS[name][0]
    start = form(channel_trajectory(weights, u, 0)).start
    change = sensitivity(selective_coefficients(form, weights), u)
    first, last = dependence(name, n)
    offsets = np.arange(len(u)) - start - np.arange(len(change))[:, None]
    assert not change[(offsets < first) | (offsets > last)].any()  # bit for bit
    for edge in (first, last):
        used = change[offsets == edge] / change.max(axis=1)
        assert (used > 0).all() and np.median(used) > 1e-4
    assert is_causal(name, n) == (last <= 0)


def test_exactly_two_forms_are_causal_beyond_order_one():
    for order in (2, 3, 4, 16):
        causal = {name for name in FORMS if is_causal(name, order)}
        assert causal == {"reachability", "reversed observability"}
    assert {name for name in FORMS if is_causal(name, 1)} == {
        "controller",
        "reachability",
        "reversed observability",
        "reversed observer",
    }


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=10)
@given(orders)
def test_every_form_is_a_companion_and_keeps_the_map(name, size):
    N, m, _, seed = size
    n = N * m
    system = random_trajectory(2 * N + 10, n, m, m, seed)
    form = FORMS[name][0](system)
    assume(np.linalg.cond(form.T).max() < 1e5)
    rng = np.random.default_rng(seed + 1)
    v, x0 = rng.normal(size=(len(system), m)), rng.normal(size=n)
    y, inside = global_solve(system, v, x0), slice(form.start, form.stop)
    x = system.run(v, x0).x[form.start]
    scale = max(1.0, np.abs(y).max())
    np.testing.assert_allclose(form.run(v[inside], x) / scale, y[inside] / scale, atol=1e-9)
    # a companion, or the inverse of one: all but one block of rows or columns is a shift
    A = form.system.A if not name.startswith("reversed") else np.linalg.inv(form.system.A)
    if name.endswith(("controller", "observability")):
        np.testing.assert_allclose(A[:, :-m] - np.eye(n, k=m)[:-m], 0, atol=1e-7)
    else:
        np.testing.assert_allclose(A[:, :, : n - m] - np.eye(n, k=-m)[:, : n - m], 0, atol=1e-7)


def test_structure_of_inputs_and_outputs():
    system = random_trajectory(16, 4, 2, 2, seed=3)
    first, last = np.eye(4)[:, :2], np.eye(4)[:, -2:]
    for name, part, expected in [
        ("controller", "B", last),
        ("reachability", "B", first),
        ("observability", "C", first.T),
        ("observer", "C", last.T),
    ]:
        got = getattr(FORMS[name][0](system).system, part)
        np.testing.assert_allclose(got - expected, 0, atol=1e-9)


def test_reachability_form_reads_out_the_impulse_response():
    system = random_trajectory(16, 3, 1, 2, seed=4)
    form = reachability_form(system)
    for t in range(form.start, form.stop):
        h = np.hstack([system.impulse_response(t, t - k) for k in (1, 2, 3)])
        np.testing.assert_allclose(form.system.C[t - form.start], h, atol=1e-10)


def test_reversed_observability_reads_and_feeds_back_the_same_row():
    """T_t lists past outputs of x_t run backwards: the row that closes the companion is C~_t."""
    system = random_trajectory(16, 3, 1, 1, seed=5)
    form = time_reversed(observability_form)(system)
    flip = np.eye(3)[::-1]
    A = flip @ form.system.A @ flip
    np.testing.assert_allclose(A[:, :-1] - np.eye(3, k=1)[:-1], 0, atol=1e-9)
    np.testing.assert_allclose(A[:, -1:], form.system.C @ flip, atol=1e-9)


# -- no way around it ---------------------------------------------------------------------------


def test_scaling_the_input_keeps_the_future_in():
    """T_{t+1} B_t = beta_t e_N: a_i is multiplied by beta_t / beta_{t+i-1-N}, whatever beta."""
    system, *_, rng = planted_controller(16, 3, 1, 1, seed=6)
    beta = rng.uniform(0.5, 2.0, size=16)
    scaled = LinearTrajectory(system.A, system.B / beta[:, None, None], system.C, system.D)
    a, b = (controller_form(s).system.A[:, -1] for s in (system, scaled))
    for i in (1, 2, 3):
        t = np.arange(3, 3 + len(a))
        np.testing.assert_allclose(
            b[:, i - 1], a[:, i - 1] * beta[t] / beta[t + i - 1 - 3], atol=1e-9
        )


def test_companion_shape_alone_says_nothing():
    """Any invertible A_t goes causally to any constant invertible companion; then B_t is full."""
    system = random_trajectory(12, 3, 1, 1, seed=7)
    F = np.array([[0.0, 1, 0], [0, 0, 1], [0.2, -0.3, 0.9]])
    T = [np.eye(3)]
    for A in system.A:
        T.append(F @ T[-1] @ np.linalg.inv(A))  # a function of the past alone
    moved = system.change_basis(np.array(T))
    np.testing.assert_allclose(moved.A - F, 0, atol=1e-9)
    assert np.abs(moved.B[:, :-1]).min() > 1e-3


def test_a_common_gate_is_causal():
    """A_t = g_t F and B_t = B: a_i(t) = f_i g_t .. g_{t-N+i}, no future and a_N of u_t alone."""
    rng, N, l = np.random.default_rng(8), 4, 18
    F, B = well_conditioned(rng, 1, N)[0], rng.normal(size=(N, 1))
    g = rng.uniform(0.4, 1.2, size=l)
    constant = (np.broadcast_to(x, (l, *x.shape)) for x in (B, np.ones((1, N)), np.zeros((1, 1))))
    form = controller_form(LinearTrajectory(g[:, None, None] * F, *constant))
    f = -np.poly(F)[:0:-1]  # F^N = sum f_i F^{i-1}
    for t in range(form.start, form.stop):
        expected = [f[i - 1] * np.prod(g[t - N + i : t + 1]) for i in range(1, N + 1)]
        np.testing.assert_allclose(form.system.A[t - form.start, -1], expected, atol=1e-9)


def test_scalar_decay_with_input_varying_B_is_not_causal():
    """Mamba-2's A_t = g_t I does not help once B_t varies in direction."""
    rng, l = np.random.default_rng(9), 14
    g, B = rng.uniform(0.4, 0.9, size=l), rng.normal(size=(l, 3, 1))

    def last_row(token):
        A = token[:, :1, None] * np.eye(3)
        C = np.ones((l, 1, 3))
        system = LinearTrajectory(A, token[:, 1:, None], C, np.zeros((l, 1, 1)))
        return controller_form(system).system.A[:, -1]

    change = sensitivity(last_row, np.hstack([g[:, None], B[:, :, 0]]))
    assert change[0, 3 + 1] > 1e-3 and change[0, 3 + 2] > 1e-3


def test_time_invariant_case_is_the_textbook_companion():
    rng = np.random.default_rng(10)
    A, B = well_conditioned(rng, 1, 4)[0] * 0.5, rng.normal(size=(4, 1))
    C, D = rng.normal(size=(1, 4)), np.zeros((1, 1))
    form = controller_form(time_invariant(A, B, C, D, 12))
    expected = np.broadcast_to(-np.poly(A)[:0:-1], (len(form.system), 4))
    np.testing.assert_allclose(form.system.A[:, -1], expected, atol=1e-9)


# -- when it does not exist ----------------------------------------------------------------------


def test_equal_decays_lose_reachability_at_that_time():
    system, *_ = diagonal_of_order_two(20, seed=11)
    A = system.A.copy()
    A[9, 1, 1] = A[9, 0, 0]  # one token for which both states decay alike
    lost = LinearTrajectory(A, system.B, system.C, system.D)
    with pytest.raises(ValueError, match=r"not reachable in 2 steps at t=10: R_t, .* rank 1 of 2"):
        controller_form(lost)
    with pytest.raises(ValueError, match="t=10"):
        reachability_form(lost)


def test_a_token_with_no_step_breaks_the_form_and_not_the_system():
    """Delta = 0 (padding) writes nothing: the order is lost for n steps, the scan does not mind."""
    weights = random_selective(e=3, n=2, r=1, seed=12)
    u = np.random.default_rng(12).normal(size=(20, 3))
    s = channel_trajectory(weights, u, 0)
    A, B = s.A.copy(), s.B.copy()
    A[7], B[7] = np.eye(2), 0
    paused = LinearTrajectory(A, B, s.C, s.D)
    with pytest.raises(ValueError, match="at t=8"):
        controller_form(paused)
    assert np.isfinite(paused.run(u[:, :1]).y).all()


def test_loss_of_observability_names_the_time():
    system = random_trajectory(12, 2, 1, 1, seed=13)
    C = system.C.copy()
    C[6] = C[7] @ system.A[6]  # y_6 and y_7 see the same thing
    lost = LinearTrajectory(system.A, system.B, C, system.D)
    for name in ("observability", "observer"):
        with pytest.raises(ValueError, match="not observable in 2 steps at t=6"):
            FORMS[name][0](lost)


def test_singular_transition_cannot_be_reversed():
    system = random_trajectory(12, 2, 1, 1, seed=14)
    A = system.A.copy()
    A[5] = [[1.0, 2.0], [2.0, 4.0]]
    lost = LinearTrajectory(A, system.B, system.C, system.D)
    with pytest.raises(ValueError, match="A_t is singular at t=5"):
        time_reversed(observability_form)(lost)
    controller_form(lost)  # which does not need an inverse


@pytest.mark.parametrize("t", [-1, 2, 12])
def test_the_companion_column_needs_its_whole_window(t):
    system = random_trajectory(12, 3, 1, 1, seed=18)
    with pytest.raises(ValueError, match=f"t must be in 3 .. 11; got {t}"):
        companion_column(system, t)
    companion_column(system, 3), companion_column(system, 11)


def test_reversal_twice_is_the_same_system():
    system = random_trajectory(8, 3, 1, 2, seed=16)
    again = system.reversed().reversed()
    for name in "ABCD":
        np.testing.assert_allclose(getattr(again, name), getattr(system, name), atol=1e-9)


def test_kernel_is_the_response_to_impulses():
    system = random_trajectory(7, 3, 2, 2, seed=17)
    kernel = system.kernel()
    for column in range(14):
        v = np.eye(14)[column].reshape(7, 2)
        np.testing.assert_allclose(
            kernel[:, column], global_solve(system, v, np.zeros(3)).reshape(-1), atol=1e-12
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: LinearTrajectory(s.A[0], s.B, s.C, s.D), "A must have shape"),
        (lambda s: LinearTrajectory(s.A, s.B[:, :2], s.C, s.D), "B must have shape"),
        (lambda s: LinearTrajectory(s.A, s.B, s.C * np.nan, s.D), "C must be finite.*t=0"),
        (lambda s: s.run(np.ones((3, 2))), "v must have 12 rows"),
        (lambda s: s.run(np.ones((12, 1))), "v must have 2 columns"),
        (lambda s: s.run(np.ones((12, 2)), np.ones(2)), "x0 must have shape"),
        (lambda s: s.change_basis(np.ones((12, 3, 3))), "T must have shape"),
        (lambda s: LinearTrajectory(s.A * 1j, s.B, s.C, s.D), "A must be real"),
        (lambda s: s.run(np.ones((12, 2)) * 1j), "v must be real"),
        (lambda s: s.run(np.ones((12, 2)), np.ones(3) * 1j), "x0 must be an array of real"),
        (lambda s: time_invariant(np.eye(2) * 1j, *np.ones((3, 2, 2)), l=3), "A must be real"),
        (lambda s: s.transition(2, 5), "the earlier first; got 5 .. 2"),
        (lambda s: s.transition(13, 5), r"times must lie in 0 .. 12.*got 5 .. 13"),
        (lambda s: s.reachability(2, 3), "got -1 .. 2"),
        (lambda s: s.observability(-2, 2), "got -2 .. 0"),
        (lambda s: s.observability(11, 2), "got 11 .. 13"),
        (lambda s: s.observability(2, 0), "steps must be a positive integer"),
        (lambda s: s.impulse_response(-1, -3), "got -1 .. 0"),
        (lambda s: s.window(-3, 12), "got -3 .. 12"),
        (controller_form, "multiple of m; got n=3, m=2"),
        (lambda s: observability_form(s.window(0, 3)), "too short: 3 steps, 4 needed"),
        (lambda s: dependence("companion", 2), "name must be one of"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(random_trajectory(12, 3, 2, 1, seed=18))
