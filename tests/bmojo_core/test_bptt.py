"""Truncated backpropagation: exact when nothing is truncated, and of constant memory."""

import math

import peaky
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.training import Recipe, train
from bmojo_core.training.bptt import chunks, read_on, truncated_backward

STACKS = [["bmojo"], ["mamba", "sliding_attention"], ["bmojo", "attention", "feedforward"]]


def labelled(batch: int, length: int, seed: int):
    """Random tokens and labels, a fifth of them unscored."""
    ids, labels = peaky.ids(batch, length, seed), peaky.ids(batch, length, seed + 1).clone()
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = -100
    labels[:, 0] = 1
    return ids, labels, int((labels != -100).sum())


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10 * scale, msg=name)


def full_gradients(model, ids, labels):
    loss, _ = read_on(model, ids, labels, None)
    (loss / int((labels != -100).sum())).backward()
    return gradients(model)


@settings(max_examples=6)
@given(
    layers=st.sampled_from(STACKS),
    update=st.sampled_from(["chunk", "token"]),
    wiring=st.sampled_from(["stacked", "parallel"]),
    kernel=st.sampled_from([0, 3]),
    chunk=st.integers(1, 23),
    seed=st.integers(0, 99),
)
def test_without_truncation_it_is_full_backpropagation(layers, update, wiring, kernel, chunk, seed):
    model = peaky.model(
        seed=seed, layer_types=layers, memory_update=update, wiring=wiring, key_kernel=kernel
    ).train()
    ids, labels, scored = labelled(2, 23, seed)
    expected = full_gradients(model, ids, labels)
    loss = truncated_backward(model, chunks(ids, labels, chunk), scored, horizon=None)
    with torch.no_grad():
        assert math.isclose(loss, float(read_on(model, ids, labels, None)[0]) / scored)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("horizon", [1, 2])
def test_truncation_is_backpropagation_from_a_constant_state(horizon):
    """The oracle: read everything before a group without gradients, then the group with them."""
    model, chunk = peaky.model(layer_types=["bmojo"]).train(), 5
    ids, labels, scored = labelled(2, 23, 3)
    span = horizon * chunk
    for begin in range(0, 23, span):
        state = None
        if begin:
            with torch.no_grad():
                _, state = read_on(model, ids[:, :begin], labels[:, :begin], None)
        here = slice(begin, begin + span)
        loss, _ = read_on(model, ids[:, here], labels[:, here], state)
        (0.5 * loss / scored).backward()
    expected = gradients(model)
    truncated_backward(model, chunks(ids, labels, chunk), scored, horizon=horizon, weight=0.5)
    found = gradients(model)
    assert_same(found, expected)
    full = full_gradients(model, ids, labels)
    assert any(not torch.allclose(0.5 * full[n], g, rtol=1e-3) for n, g in found.items())


def peak_bytes(function) -> int:
    """Most bytes that torch's CPU allocator had handed out at one time, above the beginning."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def test_peak_memory_does_not_depend_on_the_length():
    torch.manual_seed(0)
    config = BMojoConfig.bmojo(
        vocab_size=16, hidden_size=16, num_layers=1, num_heads=2, window=8, state_size=4,
        num_eidetic_tokens=4,
    )  # fmt: skip
    model = BMojoForCausalLM(config)

    def run(count, horizon):
        def pieces():
            g = torch.Generator().manual_seed(0)
            for _ in range(count):
                ids = torch.randint(16, (2, 33), generator=g)
                yield ids[:, :-1], ids[:, 1:].contiguous()

        model.zero_grad(set_to_none=True)
        return lambda: truncated_backward(model, pieces(), 64 * count, horizon=horizon)

    run(2, 1)()  # kernels are ready
    four, sixteen = (peak_bytes(run(count, 1)) for count in (4, 16))
    print(f"peak of 4 chunks {four}, of 16 chunks {sixteen} bytes")
    assert sixteen <= 1.05 * four
    assert peak_bytes(run(16, None)) > 2.5 * four  # the measure sees a graph that does grow


def test_the_loop_trains_on_chunks():
    """Whole sequences, and chunks whose horizon reaches back to the beginning: the same steps."""

    def run(**changes):
        recipe = Recipe(steps=2, accumulate=2, lr_ssm=1e-2, lr_attention=1e-2, **changes)
        model = peaky.model(num_layers=1)
        return train(model, lambda s: labelled(1, 12, s)[:2], recipe, progress=False)

    whole, chunked, truncated = run(), run(chunk=4, horizon=3), run(chunk=4)
    assert chunked.losses == pytest.approx(whole.losses, rel=1e-8)
    assert run(chunk=4, horizon=3, recompute=True).losses == pytest.approx(whole.losses, rel=1e-8)
    assert truncated.losses[0] == pytest.approx(whole.losses[0], rel=1e-8)
    assert truncated.losses[1] != pytest.approx(whole.losses[1], rel=1e-4)
    with pytest.raises(ValueError, match="chunk needs the loss to be scored_loss"):
        train(peaky.model(num_layers=1), lambda s: labelled(2, 20, s)[:2],
              Recipe(steps=1, chunk=4), loss=lambda *_: 0, progress=False)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(horizon=0), "horizon must be at least 1"),
        (dict(scored=0), "scored must be at least 1"),
        (dict(pieces=[]), "pieces must hold at least one chunk"),
    ],
)
def test_impossible_arguments_are_refused(arguments, says):
    ids, labels, scored = labelled(1, 6, 0)
    arguments = {"pieces": chunks(ids, labels, 3), "scored": scored, **arguments}
    with pytest.raises(ValueError, match=says):
        truncated_backward(peaky.model(num_layers=1), **arguments)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        chunks(ids, labels, 0)
    with pytest.raises(ValueError, match="one shape"):
        chunks(ids, labels[:, 1:], 2)


def test_a_loss_that_is_not_finite_is_named():
    model = peaky.model(num_layers=1).train()
    ids, labels, scored = labelled(1, 6, 0)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss of chunk 1 is nan"):
        truncated_backward(model, chunks(ids, labels, 3), scored)


@pytest.mark.parametrize(("chunk", "horizon"), [(1, 8), (1, 1), (3, 3)])
@pytest.mark.parametrize("update", ["chunk", "token"])
def test_float32_has_the_gradients_of_float64(update, chunk, horizon):
    """Loops that write a state in place must not take a token that is differentiated."""
    found = []
    for dtype in (torch.float64, torch.float32):
        model = peaky.model(layer_types=["bmojo"], memory_update=update).to(dtype).train()
        ids, labels, scored = labelled(1, 19, 0)
        truncated_backward(model, chunks(ids, labels, chunk), scored, horizon=horizon)
        found.append(gradients(model))
    exact, fast = found
    for name, gradient in exact.items():
        error = (fast[name].double() - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-3, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("layers", [["sliding_attention", "feedforward"], ["bmojo"]])
def test_steps_where_only_queries_are_trained(layers):
    """The ring that a step writes in place is what the step before keeps for its gradient."""
    found = []
    for dtype in (torch.float64, torch.float32):
        model = peaky.model(layer_types=layers, memory_chunk=64).to(dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0" in name and "q_proj" in name)
        ids = peaky.ids(1, 14)
        with torch.no_grad():
            state = model(ids[:, :6], use_cache=True).past_key_values
        loss = 0.0
        for t in range(6, 14):
            out = model(ids[:, t : t + 1], past_key_values=state, use_cache=True)
            loss, state = loss + out.logits.square().sum(), out.past_key_values
        loss.backward()
        found += gradients(model).values()
    assert len(found) == 2
    torch.testing.assert_close(found[1].double(), found[0], rtol=1e-3, atol=1e-5)
