"""The selective scan and the Mamba layer as input-varying systems; bilinear form; state loading."""

from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_weights import mamba_weights, random_selective, randomise

from bmojo_core import BMojoConfig
from bmojo_core.layers.mamba import Mamba
from bmojo_core.ops.selective_scan.reference import selective_scan_reference
from realization.sequences import (
    SelectiveWeights,
    augmented_input,
    bilinear_matrices,
    bilinear_scan,
    channel_trajectory,
    loading_prompt,
    mamba_layer,
    nilpotency_index,
    observable_rank,
    reachable_rank,
    selective_scan,
    state_size,
    transition,
)


def reference_op(w: SelectiveWeights, u: np.ndarray, x0: np.ndarray | None = None):
    """(y, last state) of bmojo_core's reference, Delta left to its softplus."""
    B, C = (torch.tensor(u @ P.T)[None] for P in (w.P_B, w.P_C))
    delta = torch.tensor(u @ w.P_down.T @ w.P_up.T)[None]
    A, D, bias = (torch.tensor(x) for x in (w.A, w.D, w.bias))
    start = None if x0 is None else torch.tensor(x0)[None]
    y, x = selective_scan_reference(
        torch.tensor(u)[None], delta, A, B, C, D, None, bias, True, start
    )
    return y[0].numpy(), x[0].numpy()


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 15), st.integers(0))
def test_selective_scan_is_the_reference_op(e, n, r, l, seed):
    weights = random_selective(e, n, r, seed)
    rng = np.random.default_rng(seed + 1)
    u, x0 = rng.normal(size=(l, e)), rng.normal(size=(e, n))
    run = selective_scan(weights).run(u, x0.reshape(-1))
    y, x = reference_op(weights, u, x0)
    np.testing.assert_allclose(run.y, y, atol=1e-12)
    np.testing.assert_allclose(run.x[-1].reshape(e, n), x, atol=1e-12)


def test_one_step_by_hand_in_fifty_digits():
    """e = n = r = 1, two tokens: every number of appendix E written out."""
    values = ([[0.7]], [[1.3]], [[0.9]], [[-1.1]], [[-0.6]], [0.25], [0.1])
    weights = SelectiveWeights(*(np.array(value) for value in values))
    u = [mpmath.mpf("0.8"), mpmath.mpf("-0.5")]
    with mpmath.workdps(50):
        x, outputs = mpmath.mpf("0.3"), []
        for token in u:
            delta = mpmath.log1p(mpmath.e ** (mpmath.mpf("0.91") * token + mpmath.mpf("0.1")))
            x = mpmath.e ** (-delta * mpmath.mpf("0.6")) * x
            x += delta * token * mpmath.mpf("0.9") * token
            outputs.append(x * mpmath.mpf("-1.1") * token + token / 4)
    y = selective_scan(weights).run([[0.8], [-0.5]], [0.3]).y[:, 0]
    np.testing.assert_allclose(y, [float(v) for v in outputs], rtol=1e-14)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_mamba_layer_is_the_layer(kernel, bias):
    config = BMojoConfig(
        hidden_size=6, expand=1.5, state_size=3, conv_kernel=kernel, dt_rank=2, num_heads=1,
        ssm_bias=bias, conv_bias=bias,
    )  # fmt: skip
    layer = randomise(Mamba(config), seed=kernel)
    u = np.random.default_rng(0).normal(size=(2, 25, 6))
    with torch.no_grad():
        expected = layer(torch.tensor(u))[0].numpy()
    system = mamba_layer(mamba_weights(layer))
    assert state_size(system) == 9 * (kernel - 1) + 9 * 3
    for row, y in zip(u, expected):
        np.testing.assert_allclose(system.run(row).y, y, atol=1e-10)


def test_the_carried_state_is_the_layers():
    config = BMojoConfig(hidden_size=6, state_size=3, dt_rank=2, num_heads=1)
    layer = randomise(Mamba(config), seed=1)
    u = np.random.default_rng(1).normal(size=(1, 17, 6))
    with torch.no_grad():
        _, state = layer(torch.tensor(u), keep_state=True)
    tail, x = np.split(mamba_layer(mamba_weights(layer)).run(u[0]).x[-1], [3 * 12])
    np.testing.assert_allclose(tail.reshape(3, 12), state.tail[0].numpy(), atol=1e-12)
    np.testing.assert_allclose(x.reshape(12, 3), state.x[0].numpy(), atol=1e-12)


def test_channels_are_systems_of_n_states_once_tokens_are_fixed():
    weights = random_selective(e=5, n=3, r=2, seed=2)
    u = np.random.default_rng(2).normal(size=(30, 5))
    run = selective_scan(weights).run(u)
    for channel in range(5):
        one = channel_trajectory(weights, u, channel).run(u[:, channel : channel + 1])
        np.testing.assert_allclose(one.y[:, 0], run.y[:, channel], atol=1e-12)
        np.testing.assert_allclose(one.x, run.x.reshape(31, 5, 3)[:, channel], atol=1e-12)


def test_fading_not_nilpotent():
    weights = random_selective(e=3, n=2, r=1, seed=3)
    u = np.random.default_rng(3).normal(size=(40, 3))
    system = selective_scan(weights)
    assert nilpotency_index(system, u) is None
    left = np.array([np.diag(transition(system, u, 0, t)) for t in range(41)])
    assert np.all(np.diff(left, axis=0) < 0)  # every coordinate fades with every token ..
    assert np.all(left[-1] > 0)  # .. and none is ever gone


def test_real_diagonal_dynamics_do_not_oscillate():
    """With constant tokens the impulse response changes sign at most n - 1 times."""
    weights = random_selective(e=2, n=3, r=1, seed=4)
    channel = channel_trajectory(weights, np.ones((60, 2)), 0)
    h = np.array([channel.impulse_response(t, 0)[0, 0] for t in range(1, 60)])
    assert (np.diff(np.sign(h)) != 0).sum() <= 2


def test_rank_along_a_trajectory():
    weights = random_selective(e=3, n=2, r=1, seed=5)
    u = np.random.default_rng(5).normal(size=(12, 3))
    system = selective_scan(weights)
    # three inputs, each moving its own channel's two states: two tokens reach everything
    assert [reachable_rank(system, u, 8, steps) for steps in (1, 2, 3)] == [3, 6, 6]
    assert [observable_rank(system, u, 4, steps) for steps in (1, 2, 3)] == [3, 6, 6]


def test_slopes_of_the_scan_and_the_convolution():
    config = BMojoConfig(hidden_size=4, expand=1, state_size=2, dt_rank=1, num_heads=1)
    weights = mamba_weights(randomise(Mamba(config), seed=6))
    convolution = mamba_layer(weights).stages[0]
    rng = np.random.default_rng(6)
    for stage, width in zip((convolution, selective_scan(weights.scan)), (4, 4)):
        u, x = rng.normal(size=width), rng.normal(size=stage.n)
        numeric = [stage.rho(u, x + h) - stage.rho(u, x - h) for h in 1e-5 * np.eye(stage.n)]
        np.testing.assert_allclose(stage.C(u, x), np.array(numeric).T / 2e-5, atol=1e-8)


# -- bilinear form (E.1) --------------------------------------------------------------------------


def test_bilinear_matrices_step_the_bilinear_scan():
    weights = random_selective(e=3, n=2, r=2, seed=7)
    u = np.random.default_rng(7).normal(size=(15, 3))
    N, G = bilinear_matrices(weights)
    x, states = np.zeros(6), [np.zeros(6)]
    for w in augmented_input(weights, u):
        x = x + np.einsum("i,ijk,k->j", w, N, x) + G @ w
        states.append(x)
    np.testing.assert_allclose(bilinear_scan(weights).run(u).x, states, atol=1e-13)


def with_step(weights: SelectiveWeights, step: float) -> SelectiveWeights:
    """Constant Delta = step: softplus of a constant bias."""
    bias = np.full(len(weights.D), np.log(np.expm1(step)))
    return SelectiveWeights(
        0 * weights.P_up, weights.P_down, weights.P_B, weights.P_C, weights.A, weights.D, bias
    )


def order_of(errors: list[float], steps: list[float]) -> float:
    """Slope of log error against log step, least squares."""
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def test_bilinear_error_is_second_order_a_step_and_first_order_over_a_span():
    weights = random_selective(e=3, n=2, r=1, seed=8)
    steps = [2.0**-k for k in range(5, 11)]
    rng = np.random.default_rng(8)
    x0, token = rng.normal(size=6), rng.normal(size=(1, 3))
    frequencies, phases = rng.uniform(2, 6, size=3), rng.uniform(0, 6, size=3)
    one, span = [], []
    for h in steps:
        scan, euler = (f(with_step(weights, h)) for f in (selective_scan, bilinear_scan))
        one.append(np.abs(scan.run(token, x0).x[-1] - euler.run(token, x0).x[-1]).max())
        u = np.sin(frequencies * np.arange(0, 1, h)[:, None] + phases)  # one unit of time
        span.append(np.abs(scan.run(u, x0).x[-1] - euler.run(u, x0).x[-1]).max())
    assert abs(order_of(one, steps) - 2) < 0.05
    assert abs(order_of(span, steps) - 1) < 0.05


def test_the_bilinear_scan_is_unstable_where_the_scan_is_not():
    weights = with_step(random_selective(e=2, n=2, r=1, seed=9), 3.0)  # Delta |A| > 2
    u = np.zeros((40, 2))
    assert np.abs(selective_scan(weights).run(u, np.ones(4)).x[-1]).max() < 1e-9
    assert np.abs(bilinear_scan(weights).run(u, np.ones(4)).x[-1]).max() > 1e9


# -- loading a state (appendix B.2) ------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 6), st.floats(1e-3, 0.5), st.integers(0, 2**16))
def test_loading_prompt_equals_starting_from_the_state(e, n, step, seed):
    weights = random_selective(e, n, 2, seed)
    rng = np.random.default_rng(seed + 1)
    x0, u = rng.normal(size=(e, n)), rng.normal(size=(10, e))
    expected, last = reference_op(weights, u, x0)
    prompt_u, prompt_delta, prompt_B = loading_prompt(x0, weights.A, step)
    assert len(prompt_u) == n
    joined = [
        np.concatenate(pair)[None]
        for pair in (
            (prompt_u, u),
            (prompt_delta, weights.delta(u)),
            (prompt_B, u @ weights.P_B.T),
            (np.zeros((n, n)), u @ weights.P_C.T),
        )
    ]
    u_all, delta, B, C = (torch.tensor(x) for x in joined)
    A, D = torch.tensor(weights.A), torch.tensor(weights.D)
    y, x = selective_scan_reference(u_all, delta, A, B, C, D, None, None, False, None)
    np.testing.assert_allclose(y[0, n:].numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(x[0].numpy(), last, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w, u: selective_scan(w).run(u[:, :2]), "matmul|mismatch|columns"),
        (lambda w, u: channel_trajectory(w, u, 3), "channel must be in 0 .. 2"),
        (lambda w, u: channel_trajectory(w, u[:, :2], 0), "must have 3 columns"),
        (lambda w, u: loading_prompt(np.ones((3, 2)), w.A, 0.0), "step must be positive"),
        (lambda w, u: loading_prompt(np.ones((2, 2)), w.A), "one shape"),
        (lambda w, u: loading_prompt(np.ones((3, 2)) * 1j, w.A), "x0 must be an array of real"),
        (lambda w, u: replace(w, P_B=w.P_B * 1j), "P_B must be an array of real"),
        (lambda w, u: SelectiveWeights(w.P_up, w.P_down, w.P_B.T, w.P_C, w.A, w.D, w.bias), "P_B"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(random_selective(3, 2, 1, seed=0), np.ones((5, 3)))
