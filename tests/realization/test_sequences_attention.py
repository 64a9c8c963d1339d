"""Attention as a nilpotent system: against dense softmax, the ops and the layer; its memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_weights import attention_weights, random_attention, randomise

from bmojo_core import BMojoConfig
from bmojo_core.layers.attention import Attention
from bmojo_core.ops.memory_attention.reference import memory_attention_reference
from realization.sequences import (
    AttentionWeights,
    linear_attention,
    linear_attention_fir,
    nilpotency_index,
    observability_matrix,
    observable_rank,
    reachable_rank,
    rotation,
    state_size,
    transition,
    up_shift,
    windowed_attention,
    windowed_linear_attention,
)


def dense_attention(w: AttentionWeights, u: np.ndarray, window: int) -> np.ndarray:
    """Softmax attention from the (l, l) table of scores, head by head."""
    l, p = len(u), w.head_width
    age = np.arange(l)[:, None] - np.arange(l)
    out = []
    for head in range(w.heads):
        kv = head // (w.heads // w.kv_heads)
        q = u @ w.W_q[head * p : (head + 1) * p].T
        k, v = (u @ W[kv * p : (kv + 1) * p].T for W in (w.W_k, w.W_v))
        weight = np.exp(q @ k.T / np.sqrt(p)) * ((age >= 0) & (age < window))
        out.append(weight / weight.sum(axis=1, keepdims=True) @ v)
    return np.hstack(out) @ w.W_o.T


def dense_linear(w: AttentionWeights, u: np.ndarray, window: int) -> np.ndarray:
    """Linear attention from the (l, l) table of scores, head by head."""
    l, p = len(u), w.head_width
    age = np.arange(l)[:, None] - np.arange(l)
    out = []
    for head in range(w.heads):
        kv = head // (w.heads // w.kv_heads)
        q = u @ w.W_q[head * p : (head + 1) * p].T
        k, v = (u @ W[kv * p : (kv + 1) * p].T for W in (w.W_k, w.W_v))
        out.append((q @ k.T) * ((age >= 0) & (age < window)) @ v)
    return np.hstack(out) @ w.W_o.T


sizes = st.tuples(
    st.integers(1, 6),  # d
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),  # h, g
    st.integers(1, 4),  # p
    st.integers(1, 9),  # window
    st.integers(1, 12),  # l
    st.integers(0, 2**16),  # seed
)


@settings(max_examples=40)
@given(sizes)
def test_windowed_attention_is_dense_softmax_attention(size):
    d, (h, g), p, window, l, seed = size
    weights = random_attention(d, h, g, p, seed)
    u = np.random.default_rng(seed + 1).normal(size=(l, d))
    y = windowed_attention(weights, window).run(u).y
    np.testing.assert_allclose(y, dense_attention(weights, u, window), atol=1e-12)


@pytest.mark.parametrize("window", [1, 5, 40])
def test_windowed_attention_is_the_reference_op(window):
    weights = random_attention(6, 4, 2, 3, seed=0)
    u = np.random.default_rng(1).normal(size=(23, 6))
    q, k, v = (torch.tensor(u @ W.T) for W in (weights.W_q, weights.W_k, weights.W_v))
    q, k, v = (x.unflatten(-1, (-1, 3))[None] for x in (q, k, v))
    heads = memory_attention_reference(q, k, v, None, None, None, window, None, None, 3**-0.5)
    expected = heads[0].flatten(-2).numpy() @ weights.W_o.T
    np.testing.assert_allclose(windowed_attention(weights, window).run(u).y, expected, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 7, 64])
def test_windowed_attention_is_the_layer(kv_heads, window):
    config = BMojoConfig(hidden_size=12, num_heads=4, num_kv_heads=kv_heads, window=window)
    layer = randomise(Attention(config, window), seed=kv_heads)
    u = np.random.default_rng(2).normal(size=(2, 31, 12))
    with torch.no_grad():
        expected = layer(torch.tensor(u))[0].numpy()
    system = windowed_attention(attention_weights(layer.projections), window)
    for row, y in zip(u, expected):
        np.testing.assert_allclose(system.run(row).y, y, atol=1e-10)


def test_rotary_positions_are_a_shift_of_rotations():
    config = BMojoConfig(hidden_size=12, num_heads=2, num_kv_heads=1, window=6, position="rope")
    layer = randomise(Attention(config, 6), seed=3)
    u = np.random.default_rng(3).normal(size=(1, 29, 12))
    with torch.no_grad():
        expected = layer(torch.tensor(u))[0][0].numpy()
    angles = 10000.0 ** (-np.arange(0, 6, 2) / 6)
    system = windowed_attention(attention_weights(layer.projections), 6, angles=angles)
    # the layer keeps its frequencies in float32: with its own, rounded, the two are equal
    np.testing.assert_allclose(system.run(u[0]).y, expected, atol=2e-6)
    rounded = layer.projections.rotary.frequency.double().numpy()
    system = windowed_attention(attention_weights(layer.projections), 6, angles=rounded)
    np.testing.assert_allclose(system.run(u[0]).y, expected, atol=1e-10)
    angles = layer.projections.rotary.frequency.double().numpy()
    system = windowed_attention(attention_weights(layer.projections), 6, angles=angles)
    np.testing.assert_allclose(system.run(u[0]).y, expected, atol=1e-10)
    assert nilpotency_index(system, u[0], tol=0.0) == 5


def test_a_rotation_turns_pairs_of_features():
    R = rotation([0.3, 1.1])
    k = np.array([1.0, 2.0, 3.0, 4.0])
    turned = (k[:2] + 1j * k[2:]) * np.exp(1j * np.array([0.3, 1.1]))
    np.testing.assert_allclose(R @ k, np.concatenate([turned.real, turned.imag]), atol=1e-15)


@pytest.mark.parametrize("window", [2, 3, 8])
def test_nilpotent_of_order_exactly_window_minus_one(window):
    weights = random_attention(4, 2, 1, 2, seed=4)
    system = windowed_attention(weights, window)
    u = np.random.default_rng(4).normal(size=(20, 4))
    assert nilpotency_index(system, u) == window - 1
    assert np.any(transition(system, u, 3, 3 + window - 2))
    assert not np.any(transition(system, u, 3, 3 + window - 1))


def test_deadbeat_the_initial_state_is_forgotten_exactly():
    weights = random_attention(4, 2, 2, 2, seed=5)
    system = windowed_attention(weights, 5)
    rng = np.random.default_rng(5)
    u, x0 = rng.normal(size=(12, 4)), rng.normal(size=system.n)
    x0[8::9] = 1.0  # full slots
    from_zero, from_x0 = system.run(u), system.run(u, x0)
    assert np.abs(from_zero.y[:4] - from_x0.y[:4]).max(axis=1).min() > 1e-3
    assert np.array_equal(from_zero.y[4:], from_x0.y[4:])


def test_state_size_is_the_papers_plus_an_occupancy_bit():
    weights = random_attention(8, 4, 2, 2, seed=6)
    assert state_size(windowed_attention(weights, 9)) == 8 * (2 * 2 * 2 + 1)
    assert state_size(windowed_attention(weights, 1)) == 0


def test_only_what_tokens_write_is_reachable():
    """(k, v) = [W_k; W_v] u lies in a space of rank <= d, so 2 V N numbers are too many."""
    u = np.random.default_rng(7).normal(size=(9, 3))
    narrow = windowed_attention(random_attention(3, 1, 1, 4, seed=7), 5)  # d = 3 < 2 p = 8
    assert reachable_rank(narrow, u, t=6, steps=6) == 4 * 3
    u = np.random.default_rng(7).normal(size=(9, 6))
    wide = windowed_attention(random_attention(6, 1, 1, 2, seed=8), 5)  # d = 6 > 2 p = 4
    assert reachable_rank(wide, u, t=6, steps=6) == 4 * 4


def test_the_slope_of_the_readout_is_its_derivative():
    system = windowed_attention(random_attention(5, 4, 2, 3, seed=9), 4)
    rng = np.random.default_rng(9)
    u, x = rng.normal(size=5), rng.normal(size=system.n)
    x[12::13] = [0.0, 1.0, 1.0]
    moves = 1e-6 * np.eye(system.n)
    moves[12::13] = 0  # occupancy is not varied
    numeric = np.array([system.rho(u, x + h) - system.rho(u, x - h) for h in moves]).T / 2e-6
    np.testing.assert_allclose(system.C(u, x), numeric, atol=1e-8)


def test_observability_sees_each_slot_until_it_falls_out():
    weights = random_attention(6, 1, 1, 2, seed=10)
    u = np.random.default_rng(10).normal(size=(20, 6))
    system = windowed_attention(weights, 4)
    O = observability_matrix(system, u, t=8, steps=6)
    assert O.shape == (36, 15)
    np.testing.assert_allclose(O[18:], 0, atol=0)  # after N = 3 steps nothing is left to see
    # the oldest slot is read once: by one query it shows its weight, not all its 4 numbers
    assert observable_rank(system, u, t=8, steps=6) < 12


@settings(max_examples=30)
@given(sizes)
def test_three_linear_attentions(size):
    d, (h, g), p, window, l, seed = size
    weights = random_attention(d, h, g, p, seed)
    u = np.random.default_rng(seed + 1).normal(size=(l, d))
    full, near = dense_linear(weights, u, l), dense_linear(weights, u, window)
    scale = 1 + np.abs(full).max()
    np.testing.assert_allclose(linear_attention(weights).run(u).y, full, atol=1e-12 * scale)
    fir = linear_attention_fir(weights, l)
    np.testing.assert_allclose(fir.run(u).y, full, atol=1e-12 * scale)
    assert fir.n == (l - 1) * g * p * p
    np.testing.assert_allclose(
        linear_attention_fir(weights, window).run(u).y, near, atol=1e-12 * scale
    )
    if window > 1:
        sliding = windowed_linear_attention(weights, window)
        np.testing.assert_allclose(sliding.run(u).y, near, atol=1e-11 * scale)


def test_the_sliding_sum_never_forgets_an_error_and_the_register_does():
    weights = random_attention(4, 1, 1, 2, seed=11)
    rng = np.random.default_rng(11)
    u, error = rng.normal(size=(30, 4)), rng.normal(size=4)
    sliding, register = windowed_linear_attention(weights, 5), linear_attention_fir(weights, 5)
    assert nilpotency_index(register, u) == 4
    assert nilpotency_index(sliding, u) is None
    x0 = np.zeros(sliding.n)
    x0[:4] = error
    left = sliding.run(u, x0).x[-1] - sliding.run(u).x[-1]
    np.testing.assert_allclose(left[:4], error, atol=1e-12)
    # the eigenvalue 1 is unreachable: what tokens write cancels out of S - sum of the register
    assert reachable_rank(sliding, u, t=20, steps=20) <= 4 * 4


def test_slopes_of_linear_attention():
    weights = random_attention(5, 2, 1, 3, seed=12)
    rng = np.random.default_rng(12)
    systems = [
        linear_attention(weights),
        linear_attention_fir(weights, 3),
        windowed_linear_attention(weights, 3),
    ]
    for system in systems:
        u, x = rng.normal(size=5), rng.normal(size=system.n)
        numeric = [system.rho(u, x + h) - system.rho(u, x - h) for h in 1e-5 * np.eye(system.n)]
        np.testing.assert_allclose(system.C(u, x), np.array(numeric).T / 2e-5, atol=1e-8)
        numeric = [system.b(u + h) - system.b(u - h) for h in 1e-5 * np.eye(5)]
        np.testing.assert_allclose(system.B(u), np.array(numeric).T / 2e-5, atol=1e-8)


def test_up_shift():
    expected = np.zeros((6, 6))
    expected[[0, 1, 2, 3], [2, 3, 4, 5]] = 1
    assert np.array_equal(up_shift(3, np.eye(2)), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: windowed_attention(w, 0), "window must be at least 1"),
        (lambda w: windowed_attention(w, 3, angles=[1.0, 2.0]), "angles must have shape"),
        (lambda w: linear_attention_fir(w, 0), "length must be at least 1"),
        (lambda w: windowed_linear_attention(w, 1), "window must be at least 2"),
        (lambda w: windowed_attention(w, 3).run(np.zeros((0, 4))), "l >= 1"),
        (lambda w: windowed_attention(w, 3).run(np.full((2, 4), np.nan)), "must be finite"),
        (lambda w: windowed_attention(w, 3).run(np.ones((2, 4)), np.ones(3)), "x0 must have"),
        (lambda w: AttentionWeights(w.W_q, w.W_k, w.W_v, w.W_o, 2, 3), "kv_heads must divide"),
        (
            lambda w: AttentionWeights(w.W_q * 1j, w.W_k, w.W_v, w.W_o, 2, 1),
            "W_q must be an array of real",
        ),
        (lambda w: AttentionWeights(w.W_q, w.W_k[:1], w.W_v, w.W_o, 2, 1), "W_k must have shape"),
        (lambda w: AttentionWeights(w.W_q, w.W_k, w.W_v, w.W_o[:, :1], 2, 1), "W_o must have"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(random_attention(4, 2, 1, 2, seed=0))
