"""Stacked hybrids and B'MOJO-F as input-varying systems, against the model's own layers."""

import numpy as np
import pytest
import torch
from sequence_weights import (
    attention_weights,
    mamba_weights,
    norm_weights,
    random_attention,
    randomise,
)

from bmojo_core import BMojoConfig, BMojoModel
from bmojo_core.layers.bmojo import BMojo
from realization.sequences import (
    Fading,
    RmsNorm,
    WindowedScan,
    bmojo_f_layer,
    fading_attention,
    mamba_layer,
    nilpotency_index,
    stacked_hybrid,
    state_size,
    windowed_attention,
)

SIZES = dict(vocab_size=11, hidden_size=8, num_heads=2, num_kv_heads=1, state_size=2, dt_rank=2)


def test_stacked_hybrid_is_the_model():
    config = BMojoConfig.hybrid(**SIZES, num_layers=2, window=5)
    model = randomise(BMojoModel(config), seed=0).eval()
    ids = torch.randint(0, 11, (1, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).last_hidden_state[0].numpy()
    builders = {
        "mamba": lambda layer: mamba_layer(mamba_weights(layer)),
        "sliding_attention": lambda a: windowed_attention(attention_weights(a.projections), 5),
    }
    layers = [(norm_weights(s.norm), builders[s.kind](s.inner)) for s in model.layers]
    system = stacked_hybrid(layers)
    u = model.embed_tokens.weight.detach().numpy()[ids[0].numpy()]
    h = system.run(u).y
    last = norm_weights(model.norm)
    np.testing.assert_allclose([last(row) for row in h], expected, atol=1e-10)
    assert state_size(system) == sum(layer.n for _, layer in layers)
    assert state_size(system) == 2 * (16 * 3 + 16 * 2 + 4 * (2 * 4 + 1))


@pytest.mark.parametrize("wiring", ["stacked", "parallel"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("update", "chunk", "window", "tokens", "stride"),
    [
        ("token", None, 4, 1, 1),
        ("token", None, 3, 3, 2),
        ("token", None, 1, 2, 1),
        ("chunk", None, 5, 1, 1),
        ("chunk", 3, 5, 2, 2),
        ("chunk", 7, 2, 4, 3),
        ("chunk", 1, 4, 2, 1),
    ],
)
def test_bmojo_f_layer_is_the_layer(update, chunk, window, tokens, stride, normalize, wiring):
    config = BMojoConfig.bmojo_f(
        **SIZES, window=window, num_fading_tokens=tokens, fading_stride=stride, wiring=wiring,
        memory_update=update, memory_chunk=chunk, normalize_fading=normalize, key_kernel=0,
    )  # fmt: skip
    layer = randomise(BMojo(config), seed=window)
    h = np.random.default_rng(1).normal(size=(1, 26, 8))
    with torch.no_grad():
        expected = layer(torch.tensor(h))[0][0].numpy()
    fading = Fading(
        tokens=tokens,
        chunk=None if update == "token" else (chunk or window),
        stride=stride,
        norm=norm_weights(layer.attention.fading_norm) if normalize else None,
    )
    system = bmojo_f_layer(
        mamba_weights(layer.ssm),
        attention_weights(layer.attention.projections),
        window,
        fading,
        norm_weights(layer.ssm_norm),
        norm_weights(layer.attention_norm) if wiring == "stacked" else None,
    )
    np.testing.assert_allclose(system.run(h[0]).y, expected, atol=1e-10)


@pytest.mark.parametrize("wiring", ["stacked", "parallel"])
def test_bmojo_f_in_canonical_form_is_the_layer(wiring):
    """Both halves block companions, the scan's state the window of its inputs and outputs."""
    config = BMojoConfig.bmojo_f(
        **SIZES, window=4, num_fading_tokens=2, wiring=wiring, key_kernel=0
    )
    layer = randomise(BMojo(config), seed=5)
    h = np.random.default_rng(5).normal(size=(1, 20, 8))
    with torch.no_grad():
        expected = layer(torch.tensor(h))[0][0].numpy()
    system = bmojo_f_layer(
        mamba_weights(layer.ssm),
        attention_weights(layer.attention.projections),
        window=4,
        fading=Fading(tokens=2, chunk=4, norm=norm_weights(layer.attention.fading_norm)),
        ssm_norm=norm_weights(layer.ssm_norm),
        attention_norm=norm_weights(layer.attention_norm) if wiring == "stacked" else None,
        scan=lambda weights: WindowedScan(weights, blocks=4),
    )
    np.testing.assert_allclose(system.run(h[0]).y, expected, atol=1e-10)


def random_fading(chunk: int | None) -> tuple[Fading, np.random.Generator]:
    rng = np.random.default_rng(2)
    norm = RmsNorm(rng.normal(size=5))
    return Fading(tokens=2, chunk=chunk, stride=2, norm=norm), rng


@pytest.mark.parametrize("chunk", [None, 3])
def test_the_slope_of_the_joint_readout_is_its_derivative(chunk):
    fading, rng = random_fading(chunk)
    system = fading_attention(random_attention(5, 4, 2, 3, seed=2), 4, fading)
    u = rng.normal(size=(13, 10))
    x = system.run(u).x[-1]
    varied = np.ones(system.n, dtype=bool)  # neither occupancy nor the clock is varied
    varied[12 : 3 * 13 : 13] = False
    varied[3 * 13 + 5 : 3 * 13 + 6 * fading.span(4) : 6] = False
    varied[system.n - (chunk or 0) :] = False
    moves = 1e-6 * np.diag(varied.astype(float))
    numeric = np.array([system.rho(u[0], x + h) - system.rho(u[0], x - h) for h in moves]).T / 2e-6
    np.testing.assert_allclose(system.C(u[0], x)[:, varied], numeric[:, varied], atol=1e-8)


def test_only_the_clock_keeps_bmojo_f_attention_from_being_nilpotent():
    weights = random_attention(5, 1, 1, 2, seed=3)
    u = np.random.default_rng(3).normal(size=(30, 10))
    every_token = fading_attention(weights, 4, Fading(tokens=2, stride=3))
    assert nilpotency_index(every_token, u) == 4 + 3  # the delay line is the longer register
    chunked = fading_attention(weights, 4, Fading(tokens=2, stride=3, chunk=4))
    assert nilpotency_index(chunked, u) is None
    eigenvalues = np.linalg.eigvals(chunked.A(u[0])[-4:, -4:])
    np.testing.assert_allclose(np.abs(eigenvalues), 1, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fading(tokens=0), "tokens must be at least 1"),
        (lambda: Fading(stride=0), "stride must be at least 1"),
        (lambda: Fading(chunk=0), "chunk must be at least 1"),
        (lambda: stacked_hybrid([]), "at least one"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
