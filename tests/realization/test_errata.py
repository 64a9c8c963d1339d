"""One test for each verdict of docs/errata.md: equations of the paper's 3.1, B.2, C and E.

Each test is written from the equation, in plain numpy where it can be; what fails is shown to fail
by a margin, what holds with a correction is shown to hold with it.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from sequence_weights import random_attention, random_selective

from realization.sequences import (
    LinearTrajectory,
    Series,
    bilinear_scan,
    channel_trajectory,
    companion_column,
    controller_form,
    frozen_form,
    loading_prompt,
    nilpotency_index,
    observable_rank,
    reachable_rank,
    selective_scan,
    sensitivity,
    up_shift,
    windowed_attention,
)


def tokens(l: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(l, d))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative distance of two output sequences."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def markov(A, B, C, D, count: int) -> np.ndarray:
    """Impulse response of x_{t+1} = A x_t + B u_t, y_t = C x_t + D u_t."""
    powers = [np.linalg.matrix_power(A, k) for k in range(count - 1)]
    return np.array([D, *(C @ P @ B for P in powers)])


# -- section 3.1 ----------------------------------------------------------------------------------


def test_31_general_form_holds_for_attention_and_the_scan():
    """x_{t+1} = A(u_t) x_t + b(u_t), y_t = rho(u_t, x_t): the state enters the update linearly."""
    u = tokens(1, 4)[0]
    for system in (windowed_attention(random_attention(4, 2, 1, 2, 0), 4),
                   selective_scan(random_selective(4, 3, 2, 0))):  # fmt: skip
        rng = np.random.default_rng(1)
        x, z = rng.normal(size=(2, system.n))
        after = [system.step(u, v)[1] for v in (x, z, 0.3 * x + 0.7 * z)]
        np.testing.assert_allclose(after[2], 0.3 * after[0] + 0.7 * after[1], atol=1e-12)


def test_31_general_form_fails_for_two_scans_in_series():
    """The second scan's A depends on the first one's state: the update is not linear in x."""
    pair = Series(tuple(selective_scan(random_selective(3, 2, 1, s)) for s in (0, 1)))
    u, (x, z) = tokens(1, 3)[0], np.random.default_rng(1).normal(size=(2, pair.n))
    after = [pair.step(u, v)[1] for v in (x, z, 0.5 * x + 0.5 * z)]
    assert distance(after[2], 0.5 * after[0] + 0.5 * after[1]) > 1e-2


def test_31_general_form_holds_for_a_scan_read_by_attention():
    """The other order is in the class: attention's A is constant and reads the scan linearly."""
    attention = windowed_attention(random_attention(3, 1, 1, 2, 0), 3)
    pair = Series((selective_scan(random_selective(3, 2, 1, 0)), attention))
    u, (x, z) = tokens(1, 3)[0], np.random.default_rng(1).normal(size=(2, pair.n))
    after = [pair.step(u, v)[1] for v in (x, z, 0.5 * x + 0.5 * z)]
    np.testing.assert_allclose(after[2], 0.5 * after[0] + 0.5 * after[1], atol=1e-12)


def test_31_block_up_shift_is_nilpotent_of_order_N():
    for N in (1, 2, 5):
        A = up_shift(N, np.eye(3))
        assert not np.linalg.matrix_power(A, N).any()
        assert np.linalg.matrix_power(A, N - 1).any()


def test_31_attention_of_N_stored_tokens_sees_N_plus_1():
    """The read-out rho(u_t, x_t) has the token itself: N blocks serve a window of N + 1."""
    weights, u = random_attention(4, 1, 1, 3, 0), tokens(20, 4)
    system = windowed_attention(weights, window=5)
    assert nilpotency_index(system, u) == 4
    change = sensitivity(lambda u: system.run(u).y, u)
    assert set(np.nonzero(change[12])[0]) == set(range(8, 13))


def test_31_attention_from_a_zero_state_needs_an_occupancy_bit():
    """As printed, N empty slots are N tokens of score 0: wrong until the window is full."""
    weights, u, N = random_attention(4, 1, 1, 3, 0), tokens(20, 4), 4
    x, printed = np.zeros((N, 2, 3)), []
    for token in u:
        q, k, v = weights.W_q @ token, weights.W_k @ token, weights.W_v @ token
        keys, values = np.vstack([x[:, 0], k]), np.vstack([x[:, 1], v])
        weight = np.exp(keys @ q / np.sqrt(3))
        printed.append(weights.W_o @ (weight @ values / weight.sum()))
        x = np.concatenate([x[1:], [[k, v]]])
    y = windowed_attention(weights, N + 1).run(u).y
    np.testing.assert_allclose(printed[N:], y[N:], atol=1e-12)
    errors = [distance(a, b) for a, b in zip(printed[:N], y[:N])]
    assert min(errors) > 1e-2


def test_31_two_V_N_numbers_are_not_minimal():
    """Keys and values are both functions of one token: rank [W_k; W_v] numbers a token suffice."""
    system, u = windowed_attention(random_attention(3, 1, 1, 3, 0), 5), tokens(12, 3)
    assert 2 * 3 * 4 == 24
    assert reachable_rank(system, u, t=8, steps=8) == 3 * 4


def test_31_mamba_reads_the_state_after_the_write():
    """y_t = C_t h_t + D u_t, h_t with token t in it: strictly, (C A) x_t + (C B + D) u_t."""
    weights, u = random_selective(3, 2, 1, 0), tokens(20, 3)
    delta, B, C = weights.delta(u), u @ weights.P_B.T, u @ weights.P_C.T
    h, before, after = np.zeros((3, 2)), [], []
    for t in range(20):
        before.append(h @ C[t] + weights.D * u[t])
        h = np.exp(delta[t][:, None] * weights.A) * h + np.outer(delta[t] * u[t], B[t])
        after.append(h @ C[t] + weights.D * u[t])
    y = selective_scan(weights).run(u).y
    np.testing.assert_allclose(y, after, atol=1e-12)
    assert distance(np.array(before), y) > 1e-2


def test_31_real_positive_diagonal_dynamics_do_not_oscillate():
    """n positive poles: the impulse response changes sign at most n - 1 times. A rotation does."""
    rng, k = np.random.default_rng(0), np.arange(200)
    for n in (1, 2, 3, 6):
        for _ in range(50):
            h = (rng.normal(size=n) * rng.uniform(0, 1, size=n) ** k[:, None]).sum(axis=1)
            assert (np.diff(np.sign(h[h != 0])) != 0).sum() <= n - 1
    assert (np.diff(np.sign(0.99**k * np.cos(0.5 * k + 0.1))) != 0).sum() > 20


def test_31_a_pole_at_one_writes_nothing_or_keeps_everything():
    """A scan's pole is exp(Delta A) < 1 unless Delta = 0, when it writes nothing either; a system
    that has the pole 1 and writes (a running sum) never frees what it holds."""
    weights, u = random_selective(2, 2, 1, 0), tokens(30, 2)
    scan = selective_scan(weights)
    assert max(np.diag(scan.A(token)).max() for token in u) < 1
    held = LinearTrajectory(*(np.ones((30, 1, 1)) for _ in "ABC"), np.zeros((30, 1, 1)))
    assert all(held.impulse_response(t, 3)[0, 0] == 1 for t in range(4, 30))


def test_31_zero_last_row_is_attention():
    """B'MOJO-F's A(u) with a_1 .. a_N = 0 is attention's up-shift, entry by entry."""
    weights = random_attention(4, 1, 1, 3, 0)
    A = windowed_attention(weights, 5).A(np.zeros(4))
    block = 2 * 3 + 1
    companion = np.vstack([np.eye(4 * block, k=block)[:-block], np.zeros((block, 4 * block))])
    assert np.array_equal(A, companion)


# -- the canonical form (3.1 and C) ----------------------------------------------------------------


def test_C_characteristic_polynomial_row_is_mamba_with_constant_coefficients():
    poles, c = np.array([0.9, 0.6, 0.3]), np.array([1.0, -2.0, 0.5])
    diagonal = markov(np.diag(poles), np.ones((3, 1)), c[None], np.zeros((1, 1)), 30)
    companion = np.eye(3, k=1)
    companion[-1] = -np.poly(poles)[:0:-1]
    # numerator coefficients: sum_i c_i prod_{j != i} (z - p_j), constant term first
    numerator = sum(ci * np.poly(np.delete(poles, i))[::-1] for i, ci in enumerate(c))
    form = markov(companion, np.eye(3)[:, -1:], numerator[None], np.zeros((1, 1)), 30)
    np.testing.assert_allclose(form, diagonal, atol=1e-12)


def test_C_frozen_pole_matching_fails_for_input_varying_coefficients():
    weights, u = random_selective(4, 3, 2, 0), tokens(80, 4)
    system, v = channel_trajectory(weights, u, 0), u[:, :1]
    assert distance(frozen_form(system).run(v).y, system.run(v).y) > 0.1
    same = np.repeat(u[:1], 80, axis=0)
    system = channel_trajectory(weights, same, 0)
    assert distance(frozen_form(system).run(v).y, system.run(v).y) < 1e-9


def test_C_exact_last_row_depends_on_past_and_future_tokens():
    """a_i(t) is a function of u_{t-n+i-1} .. u_{t+i-1}; at n = 4 the row of u_{t-4} .. u_{t+3}."""
    weights, u = random_selective(4, 4, 2, 0), tokens(16, 4)

    def row(u):
        return controller_form(channel_trajectory(weights, u, 0)).system.A[:, -1]

    used = np.nonzero(sensitivity(row, u)[3] > 1e-6)[0] - (4 + 3)
    assert (used.min(), used.max()) == (-4, 3)
    system = channel_trajectory(weights, u, 0)
    causal = [companion_column(system, 7 + i)[i, 0] for i in range(4)]
    np.testing.assert_allclose(row(u)[3], causal, atol=1e-8)


def test_C_the_exact_row_at_order_one_is_causal():
    """n = 1: a(t) = A_t B_{t-1} / B_t, which is a(u_t) alone where B is constant."""
    weights, u = random_selective(4, 1, 2, 0), tokens(16, 4)
    system = channel_trajectory(weights, u, 0)
    form, t = controller_form(system), np.arange(1, 16)
    expected = system.A[t, 0, 0] * system.B[t - 1, 0, 0] / system.B[t, 0, 0]
    np.testing.assert_allclose(form.system.A[:, 0, 0], expected, rtol=1e-12)


# -- appendix C, conversions ---------------------------------------------------------------------


def not_strictly_causal(A, B, C, D, u):
    """x_t = A x_{t-1} + B u_t, y_t = C x_t + D u_t, from x_{-1} = 0."""
    x, y = np.zeros(len(A)), []
    for token in u:
        x = A @ x + B @ token
        y.append(C @ x + D @ token)
    return np.array(y)


def strictly_causal(A, B, C, D, u, late: int = 0):
    """x_{t+1} = A x_t + B u_{t-late}, y_t = C x_t + D u_t."""
    x, y = np.zeros(len(A)), []
    for t, token in enumerate(u):
        y.append(C @ x + D @ token)
        x = A @ x + (B @ u[t - late] if t >= late else 0)
    return np.array(y)


def constants(n: int, m: int, p: int, diagonal: bool, seed: int = 0):
    rng = np.random.default_rng(seed)
    A = np.diag(rng.uniform(0.2, 0.95, size=n)) if diagonal else 0.4 * rng.normal(size=(n, n))
    return (A, *(rng.normal(size=shape) for shape in ((n, m), (p, n), (p, m))))


def test_C_strictly_causal_form_needs_u_t_not_u_t_minus_1():
    """C^ = C A, D^ = C B + D with B u_t in the update; with u_{t-1} the map is another one."""
    A, B, C, D = constants(4, 2, 3, diagonal=False)
    u = tokens(30, 2)
    y = not_strictly_causal(A, B, C, D, u)
    np.testing.assert_allclose(strictly_causal(A, B, C @ A, C @ B + D, u), y, atol=1e-10)
    assert distance(strictly_causal(A, B, C @ A, C @ B + D, u, late=1), y) > 0.1


def test_C_read_out_C_A_B_holds_for_diagonal_A_and_unit_input():
    """One input, A diagonal: B moves into the read-out, C^ = C A diag(B), and b becomes ones."""
    A, B, C, D = constants(4, 1, 1, diagonal=True)
    u = tokens(30, 1)
    y = not_strictly_causal(A, B, C, D, u)
    moved = strictly_causal(A, np.ones((4, 1)), C @ A @ np.diag(B[:, 0]), C @ B + D, u)
    np.testing.assert_allclose(moved, y, atol=1e-12)
    A, B, C, D = constants(4, 1, 1, diagonal=False)  # not so when A is not diagonal
    y = not_strictly_causal(A, B, C, D, u)
    moved = strictly_causal(A, np.ones((4, 1)), C @ A @ np.diag(B[:, 0]), C @ B + D, u)
    assert distance(moved, y) > 0.1


def test_C_constant_diagonal_maps_depend_on_the_entrywise_product_of_C_and_B():
    """h_k = sum_i c_i b_i p_i^k: equal entrywise products, equal maps; equal C B is not enough."""
    A, B, C, D = constants(3, 1, 1, diagonal=True)
    u, scale = tokens(30, 1), np.array([2.0, -0.5, 3.0])
    y = not_strictly_causal(A, B, C, D, u)
    same = not_strictly_causal(A, B * scale[:, None], C / scale, D, u)
    np.testing.assert_allclose(same, y, atol=1e-12)
    other = C + np.cross(B[:, 0], [1.0, 2.0, 3.0])  # the same product C B
    np.testing.assert_allclose(other @ B, C @ B, atol=1e-12)
    assert distance(not_strictly_causal(A, B, other, D, u), y) > 0.1


def test_C_input_varying_maps_do_not_depend_on_same_time_products():
    """h(t, s) = C_t Phi(t, s+1) B_s pairs C, B of different times: C_t B_t does not settle it."""
    weights, u = random_selective(4, 2, 1, 0), tokens(30, 4)
    system, v = channel_trajectory(weights, u, 0), u[:, :1]
    gain = np.random.default_rng(1).uniform(0.5, 2.0, size=(30, 1, 1))
    other = LinearTrajectory(system.A, system.B * gain, system.C / gain, system.D)
    np.testing.assert_allclose(other.C @ other.B, system.C @ system.B, atol=1e-12)
    assert distance(other.run(v).y, system.run(v).y) > 0.1


def transfer_function_response(numerator, denominator, count):
    """Power series in 1/z of (b_0 + .. + b_{n-1} z^{n-1}) / (a_0 + .. + a_{n-1} z^{n-1} + z^n)."""
    n, h = len(numerator), []
    for k in range(1, count):  # z^{-k}: b_{n-k} = h_k + sum_j a_{n-j} h_{k-j}
        known = sum(denominator[n - j] * h[k - j - 1] for j in range(1, min(n, k - 1) + 1))
        h.append((numerator[n - k] if k <= n else 0) - known)
    return np.array([0.0, *h])


def companion_of(numerator, denominator, sign):
    n = len(numerator)
    A = np.eye(n, k=1)
    A[-1] = sign * np.asarray(denominator)
    return A, np.eye(n)[:, -1:], np.asarray(numerator)[None], np.zeros((1, 1))


def test_C_transfer_function_to_companion_needs_minus_a_in_the_last_row():
    b, a = [0.3, -1.0, 0.7], [-0.2, 0.5, -0.9]
    h = transfer_function_response(b, a, 25)
    np.testing.assert_allclose(markov(*companion_of(b, a, -1), 25)[:, 0, 0], h, atol=1e-12)
    assert distance(markov(*companion_of(b, a, +1), 25)[:, 0, 0], h) > 0.1


def test_C_the_companion_is_not_minimal_when_a_root_cancels():
    """(z - .5) / ((z - .5)(z - .8)) has order 1, not 2."""
    b, a = [-0.5, 1.0], np.poly([0.5, 0.8])[:0:-1]
    A, B, C, D = companion_of(b, a, -1)
    h = markov(A, B, C, D, 12)[1:, 0, 0]
    H = np.array([h[i : i + 5] for i in range(5)])
    assert np.linalg.matrix_rank(H, tol=1e-10) == 1
    O = np.vstack([C, C @ A])
    assert np.linalg.matrix_rank(O, tol=1e-10) == 1  # reachable by construction, not observable


def test_C_linear_attention_is_an_FIR_filter_whose_state_grows():
    """y_t = sum_{j <= t} (q_t . k_j) v_j: after t tokens their t products are all needed."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 12, 2))
    S, recursive = np.zeros((2, 2)), []
    for t in range(12):
        S = S + np.outer(v[t], k[t])
        recursive.append(S @ q[t])
    fir = [sum((q[t] @ k[j]) * v[j] for j in range(t + 1)) for t in range(12)]
    np.testing.assert_allclose(fir, recursive, atol=1e-12)
    # as a register of t products the state grows; as a running sum it is V x V, with A = I


def products(l: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.einsum("ti,tj->tij", *rng.normal(size=(2, l, 2)))


def test_C_x_t_is_x_t_minus_K_plus_the_sum_holds_for_the_running_sum_only():
    o, K = products(20), 4
    running = np.cumsum(o, axis=0)
    window = np.array([o[max(0, t - K + 1) : t + 1].sum(axis=0) for t in range(20)])
    recent = window  # the sum over the last K
    np.testing.assert_allclose(running[K:], running[:-K] + recent[K:], atol=1e-12)
    assert distance(window[:-K] + recent[K:], window[K:]) > 0.1
    # the windowed recursion: one in, one out
    np.testing.assert_allclose(window[K:], window[K - 1 : -1] + o[K:] - o[:-K], atol=1e-12)


def test_C_local_global_split_holds_without_softmax_and_fails_with_it():
    rng, K = np.random.default_rng(0), 3
    q, k, v = rng.normal(size=(3, 12, 2))
    t = 11
    old, new = slice(0, t - K + 1), slice(t - K + 1, t + 1)
    linear = [(q[t] @ k[s].T) @ v[s] for s in (old, new, slice(0, t + 1))]
    np.testing.assert_allclose(linear[0] + linear[1], linear[2], atol=1e-12)

    def softmax(s):
        weight = np.exp(k[s] @ q[t])
        return weight @ v[s] / weight.sum(), weight.sum()

    (a, za), (b, zb), (both, _) = (softmax(s) for s in (old, new, slice(0, t + 1)))
    assert distance(a + b, both) > 0.1
    np.testing.assert_allclose((za * a + zb * b) / (za + zb), both, atol=1e-12)  # with both masses


# -- appendix B.2 ---------------------------------------------------------------------------------


def test_B2_one_hot_tokens_load_a_state():
    """x_{t+1} = x_t + B'_t x0_t, B'_t one-hot: after h tokens the state is x0."""
    x0, x = np.random.default_rng(0).normal(size=6), np.zeros(6)
    for t in range(6):
        x = x + np.eye(6)[t] * x0[t]
    assert np.array_equal(x, x0)


def test_B2_a_scan_cannot_have_transition_one_and_write():
    """Delta = 0 holds the state and writes nothing; Delta > 0 writes and decays. Compensated, the
    prompt is exact; uncompensated its error is proportional to Delta."""
    weights = random_selective(3, 5, 1, 0)
    x0 = np.random.default_rng(1).normal(size=(3, 5))

    def load(u, delta, B):
        x = np.zeros((3, 5))
        for u_t, delta_t, B_t in zip(u, delta, B):
            x = np.exp(delta_t[:, None] * weights.A) * x + np.outer(delta_t * u_t, B_t)
        return x

    assert not load(x0.T, np.zeros((5, 3)), np.eye(5)).any()
    errors = []
    for step in (1e-2, 1e-3):
        u, delta, B = loading_prompt(x0, weights.A, step)
        np.testing.assert_allclose(load(u, delta, B), x0, atol=1e-12)
        errors.append(np.abs(load(x0.T / step, delta, B) - x0).max())
    assert 9 < errors[0] / errors[1] < 11


@pytest.mark.parametrize(("w", "m"), [(4, 3), (5, 1), (1, 2)])
def test_B2_interleaved_window_sees_w_inputs_and_its_own_memory(w, m):
    """[mem | chunk | mem | chunk ..], span w + m: brute force over every query after chunk 0."""
    chunks = 4
    layout = [(kind, c, i) for c in range(chunks) for kind, size in (("mem", m), ("input", w))
              for i in range(size)]  # fmt: skip
    for place, (kind, c, f) in enumerate(layout):
        if kind == "input" and c > 0:
            seen = layout[max(0, place - (w + m) + 1) : place + 1]
            assert {s for s in seen if s[0] == "mem"} == {("mem", c, i) for i in range(m)}
            inputs = [chunk * w + i for what, chunk, i in seen if what == "input"]
            assert inputs == list(range(c * w + f - w + 1, c * w + f + 1))


# -- appendix E -----------------------------------------------------------------------------------


def test_E_update_holds_as_printed():
    """x_{t+1} = exp(diag(Delta) A) * x_t + diag(Delta) u_t u_t^T P_B^T, Delta a softplus."""
    weights, u = random_selective(4, 3, 2, 0), tokens(20, 4)
    x = np.zeros((4, 3))
    for token in u:
        Delta = np.log1p(np.exp(weights.P_up @ weights.P_down @ token + weights.bias))
        x = np.exp(np.diag(Delta) @ weights.A) * x
        x = x + np.diag(Delta) @ np.outer(token, token) @ weights.P_B.T
    np.testing.assert_allclose(selective_scan(weights).run(u).x[-1].reshape(4, 3), x, atol=1e-12)


def test_E_read_out_holds_with_x_t_plus_1_P_C_and_D_times_u():
    """y_t = x_{t+1} P_C u_t + D * u_t. The printed x P_C^T u + D multiplies (e, n) by (e, n)."""
    weights, u = random_selective(4, 3, 2, 0), tokens(20, 4)
    run = selective_scan(weights).run(u)
    x = run.x.reshape(21, 4, 3)
    corrected = [x[t + 1] @ weights.P_C @ u[t] + weights.D * u[t] for t in range(20)]
    np.testing.assert_allclose(run.y, corrected, atol=1e-12)
    early = np.array([x[t] @ weights.P_C @ u[t] + weights.D * u[t] for t in range(20)])
    constant = np.array([x[t + 1] @ weights.P_C @ u[t] + weights.D for t in range(20)])
    assert distance(early, run.y) > 0.1 and distance(constant, run.y) > 0.1
    with pytest.raises(ValueError, match="matmul"):
        x[1] @ weights.P_C.T @ u[0]


def test_E1_bilinear_step_is_first_order_in_the_step():
    """One step errs by (Delta A)^2 / 2 to leading order: a factor 4 when Delta is halved."""
    weights = random_selective(3, 2, 1, 0)
    errors, bound = [], []
    for delta in (1e-2, 5e-3):
        decay = delta * weights.A
        errors.append(np.abs(np.exp(decay) - (1 + decay)).max())
        bound.append((decay**2 / 2).max())
    assert abs(errors[0] / errors[1] - 4) < 0.05
    np.testing.assert_allclose(errors, bound, rtol=0.02)


def test_E1_augmented_input_is_needed():
    """The update is not bilinear in (x, u) itself: Delta(u) u B(u)^T is not linear in u."""
    scan, u = bilinear_scan(random_selective(3, 2, 1, 0)), tokens(1, 3)[0]
    assert distance(scan.b(2 * u), 2 * scan.b(u)) > 0.1


def test_31_the_scan_is_generically_reachable_and_observable_in_n_steps():
    """n states a channel are needed: on random tokens n steps reach and show all of them."""
    weights, u = random_selective(3, 3, 1, 0), tokens(20, 3)
    system = selective_scan(weights)
    assert [reachable_rank(system, u, t=10, steps=k) for k in (2, 3)] == [6, 9]
    assert [observable_rank(system, u, t=10, steps=k) for k in (2, 3)] == [6, 9]


def test_every_verdict_names_a_test_that_exists():
    """docs/errata.md and the tests cannot drift apart: `file.py::name`, `::name` or `name`."""
    here = Path(__file__).parent
    text = (here.parents[1] / "docs" / "errata.md").read_text()
    rows = re.split(r"^(?=\d+\. )", text, flags=re.MULTILINE)[1:]
    assert [int(row.split(".")[0]) for row in rows] == list(range(1, 34))
    for row in rows:
        verdicts = re.findall(r"\*\*([^*]+)\*\*", row)
        assert verdicts and set(verdicts) <= {"Holds", "Holds, corrected", "Fails"}, row
        file, cited = "test_errata.py", re.findall(r"`(?:(test_\w+\.py)?(::))?(test_\w+)`", row)
        assert cited, row
        for named, colons, name in cited:
            file = named or (file if colons else "test_errata.py")
            assert f"def {name}(" in (here / file).read_text(), f"{file}::{name}"
    own = re.findall(r"^def (test_(?:31|C|B2|E|E1)_\w+)\(", Path(__file__).read_text(), re.M)
    assert [name for name in own if f"`{name}`" not in text] == []
