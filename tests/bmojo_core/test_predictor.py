"""The learned predictor trains beside the model and touches nothing else; attention is counted."""

import peaky
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bmojo_core.layers.selection import (
    POLICIES,
    Observed,
    also_minimise,
    predictor_loss,
    received_attention,
)
from bmojo_core.training import Recipe, bptt, loop, scored_loss, single
from bmojo_core.training.optim import parameter_groups


def observed(y, weights):
    b, l, d = y.shape
    k = weights.shape[1]
    return Observed(
        y, y.new_zeros(b, k, d), y.new_ones(b, l, 1, 2), None, torch.arange(l).expand(b, -1), None,
        k, 0, weights,
    )  # fmt: skip


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(model, tokens, **inputs):
    model.zero_grad()
    loss = model(tokens, labels=tokens, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def test_untrained_it_is_the_paper_s_rule():
    y, k = noise(2, 9, 4), 3
    seen = observed(y, torch.full((4, k), 1 / k, dtype=torch.float64))
    assert torch.allclose(
        POLICIES["learned_predictor"](seen).double(), POLICIES["innovation"](seen).double(),
        rtol=1e-6,
    )  # fmt: skip
    model = peaky.BMojoForCausalLM(peaky.BMojoConfig(**peaky.SIZES, selection="learned_predictor"))
    weights = model.model.layers[0].attention.predictor
    assert torch.equal(weights, torch.full_like(weights, 1 / 3))


def test_its_loss_finds_the_weights_of_an_autoregression():
    weights = torch.tensor([[0.5, -0.3], [-0.2, 0.6], [0.9, 0.0]], dtype=torch.float64)
    e, y = noise(1, 4000, 3), torch.zeros(1, 4000, 3, dtype=torch.float64)
    for t in range(2, 4000):
        y[:, t] = weights[:, 0] * y[:, t - 1] + weights[:, 1] * y[:, t - 2] + e[:, t]
    found = torch.full((3, 2), 0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = predictor_loss(observed(y, found))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (found - weights).abs().max() < 0.05


@pytest.mark.parametrize("wiring", ["stacked", "parallel"])
def test_the_loss_reaches_the_predictor_and_no_other_weight(wiring):
    tokens = peaky.ids(2, 17)
    model = peaky.model(selection="learned_predictor", wiring=wiring).train()
    loss, with_it = gradients(model, tokens)
    for layer in model.model.layers:
        layer.attention.predictor.requires_grad_(False)
    expected = {n: p for n, p in model.named_parameters() if not n.endswith("predictor")}
    model.zero_grad()
    same = model(tokens, labels=tokens, use_cache=False).loss
    same.backward()
    assert torch.equal(loss, same)
    assert all(torch.equal(with_it[n], p.grad) for n, p in expected.items())
    assert all(g.abs().max() > 0 for n, g in with_it.items() if n.endswith("predictor"))


def test_pads_do_not_count_in_its_loss():
    tokens = peaky.ids(2, 12)
    model = peaky.model(selection="learned_predictor").train()
    mask = torch.ones_like(tokens)
    mask[:, 9:] = 0
    other = tokens.clone()
    other[:, 9:] = 0
    _, a = gradients(model, tokens, attention_mask=mask)
    _, b = gradients(model, other, attention_mask=mask)
    _, alone = gradients(model, tokens[:, :9])
    for name in a:
        if name.endswith("predictor"):
            assert torch.equal(a[name], b[name])
            torch.testing.assert_close(a[name], alone[name], rtol=1e-10, atol=1e-12)


def test_it_is_not_decayed():
    model = peaky.model(selection="learned_predictor")
    for group in parameter_groups(model, 1e-3, 1e-3, 0.1):
        here = {id(p) for p in group["params"]}
        predictors = {id(layer.attention.predictor) for layer in model.model.layers}
        assert not here & predictors or group["weight_decay"] == 0.0


def test_a_loss_on_the_side_leaves_the_value_and_the_gradient():
    x, a = noise(1, 2, 3).requires_grad_(), noise(3, seed=1).requires_grad_()
    out = also_minimise(x, a.square().sum())
    (2 * out.sum()).backward()
    assert torch.equal(out, x) and torch.equal(x.grad, torch.full_like(x, 2))
    assert torch.equal(a.grad, 2 * a)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 14), st.integers(0, 14), st.sampled_from([1, 2]))
def test_attention_received_is_the_column_sum_of_a_banded_softmax(w, l, cut, groups):
    """Read at once or in two parts: r = w - 1 keys are carried from one to the next."""
    q, k = noise(2, l, 2, 4), noise(2, l, groups, 4, seed=1)
    t = torch.arange(l)
    band = (t[:, None] >= t) & (t[:, None] - t < w)
    every = torch.einsum("bthp,bshp->bhts", q, k.repeat_interleave(2 // groups, 2)) / 2
    want = every.masked_fill(~band, float("-inf")).softmax(-1).mean(1).sum(1)

    none = torch.zeros(2, w - 1, dtype=torch.bool)
    before, got = received_attention(q, k, k.new_zeros(2, w - 1, groups, 4), none)
    torch.testing.assert_close(got, want)
    assert not before.any()
    cut = min(cut, l - 1)
    if cut == 0:
        return
    _, first = received_attention(q[:, :cut], k[:, :cut], k.new_zeros(2, w - 1, groups, 4), none)
    past = F.pad(k[:, :cut], (0, 0, 0, 0, w - 1, 0))[:, cut:]
    exists = (torch.arange(cut - w + 1, cut) >= 0).expand(2, -1)
    late, second = received_attention(q[:, cut:], k[:, cut:], past, exists)
    late = F.pad(late, (cut, 0))[:, w - 1 :] if w - 1 <= cut else late[:, w - 1 - cut :]
    torch.testing.assert_close(torch.cat([first + late, second], 1).double(), want, rtol=1e-5,
                               atol=1e-6)  # fmt: skip


def test_queries_of_pads_give_nothing():
    q, k = noise(2, 9, 2, 4), noise(2, 9, 2, 4, seed=1)
    none, valid = torch.zeros(2, 3, dtype=torch.bool), torch.arange(9) < torch.tensor([[9], [5]])
    _, got = received_attention(q, k, k.new_zeros(2, 3, 2, 4), none, valid)
    _, alone = received_attention(q[1:, :5], k[1:, :5], k.new_zeros(1, 3, 2, 4), none[1:])
    torch.testing.assert_close(got[1, :5], alone[0])
    torch.testing.assert_close(got.sum(1), torch.tensor([9.0, 5.0]).double())  # one a query


def test_attention_counted_is_stored_only_behind_the_window():
    model = peaky.model(selection="accumulated_attention", num_layers=1)
    delay = model.config.window - 1
    out = model(peaky.ids(1, 13), use_cache=True).past_key_values
    memory = out.states[0].memory
    assert memory.waiting.score.shape[1] == delay
    assert int(memory.best.position.max()) < 13 - delay
    mass = memory.waiting.score.sum() + memory.best.score.sum()
    assert 0 < float(mass) < 13.0  # thirteen queries gave one each


# -- in the training loop --------------------------------------------------------------------------


def predictor_steps(recipe, batch):
    """How far one step of plain gradient descent moves each parameter."""
    model = peaky.model(selection="learned_predictor").train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loop._step(single(model), optimizer, lambda s: batch, scored_loss, recipe, 1)
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [0, 5])
def test_batches_accumulated_are_one_large_batch_for_the_predictor_too(chunk):
    """Four times the same batch: no step may depend on how often it was read."""
    batch, sizes = (peaky.ids(2, 17), peaky.ids(2, 17, seed=1)), dict(chunk=chunk, clip=1e9)
    once = predictor_steps(Recipe(1, **sizes), batch)
    four = predictor_steps(Recipe(1, accumulate=4, **sizes), batch)
    for name in once:
        torch.testing.assert_close(four[name], once[name], msg=name)


def test_chunks_count_as_their_mean():
    tokens, labels = peaky.ids(2, 17), peaky.ids(2, 17, seed=1)
    model = peaky.model(selection="learned_predictor").train()
    parts = bptt.chunks(tokens, labels, 5)
    bptt.truncated_backward(model, parts, labels.numel(), horizon=2)
    step = predictor_steps(Recipe(1, chunk=5, horizon=2, clip=1e9), (tokens, labels))
    for name, p in model.named_parameters():
        readings = 4 if name.endswith("predictor") else 1
        torch.testing.assert_close(step[name], -p.grad / readings, msg=name)
