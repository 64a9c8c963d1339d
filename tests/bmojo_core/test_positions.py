"""Perplexity by position: the same as one full forward, in the memory of one chunk."""

import math

import peaky
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bptt import peak_bytes

from bmojo_core.evaluation.positions import doubling_edges, perplexity_by_position, token_losses


def expected_losses(model, ids):
    """(b, l-1) from one full forward."""
    log_p = peaky.logits(model, ids).log_softmax(-1)
    return -log_p[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)


@settings(max_examples=6)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    kind=st.sampled_from(["bmojo", "hybrid", "transformer"]),
    seed=st.integers(0, 99),
)
def test_pieces_of_any_size_give_the_losses_of_one_forward(sizes, kind, seed):
    model = peaky.model(kind, seed=seed, num_layers=1).train()
    ids = peaky.ids(2, sum(sizes), seed)
    found = torch.cat(list(token_losses(model, ids.split(sizes, 1))), 1)
    assert model.training and bool(found[:, 0].isnan().all())
    torch.testing.assert_close(found[:, 1:], expected_losses(model.eval(), ids))


def test_intervals_hold_their_own_tokens():
    model = peaky.model(num_layers=1)
    documents = [peaky.ids(2, 40, 1), peaky.ids(3, 25, 2)]
    edges = (0, 3, 16, 32, 100)
    found = perplexity_by_position(model, documents, edges, chunk=7)
    losses = [expected_losses(model, ids) for ids in documents]
    for i in range(4):
        inside = torch.cat(
            [x[:, max(edges[i] - 1, 0) : edges[i + 1] - 1].flatten() for x in losses]
        )
        assert int(found.count[i]) == inside.numel()
        assert math.isclose(float(found.nll[i]), float(inside.mean()), rel_tol=1e-9)
        assert math.isclose(float(found.perplexity[i]), math.exp(inside.mean()), rel_tol=1e-9)
    outside = perplexity_by_position(model, documents, (5, 10, 50, 60), chunk=7)
    assert outside.count.tolist() == [25, 30 * 2 + 15 * 3, 0]
    assert bool(outside.nll[2].isnan())


def test_memory_does_not_depend_on_the_length():
    model = peaky.model(num_layers=1, dtype=torch.float32)

    def pieces(count):
        for i in range(count):
            yield peaky.ids(1, 32, i)

    def read(count):
        return lambda: [None for _ in token_losses(model, pieces(count))]

    read(2)()
    assert peak_bytes(read(16)) <= 1.05 * peak_bytes(read(4))


def test_a_model_that_breaks_down_is_not_averaged_away():
    model = peaky.model(num_layers=1)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError):
        perplexity_by_position(model, [peaky.ids(1, 8)], (0, 8))


def test_edges():
    assert doubling_edges(1000, 128) == (0, 128, 256, 512, 1000)
    assert doubling_edges(100, 128) == (0, 100)
    for edges in [(0,), (5, 5), (-1, 4)]:
        with pytest.raises(ValueError, match="edges must be"):
            perplexity_by_position(peaky.model(num_layers=1), [], edges)
    with pytest.raises(ValueError, match="chunk must be"):
        perplexity_by_position(peaky.model(num_layers=1), [], (0, 4), chunk=0)
    with pytest.raises(ValueError, match="length and first"):
        doubling_edges(0)
