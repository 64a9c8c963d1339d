"""A recorded step: same logits as the model's own, on tensors that stay where they are.

Here, without a GPU, the step runs as it is; tests/gpu does the same with a graph.
"""

import peaky
import pytest
import torch

from bmojo_core import BMojoCache, DecodeGraph
from bmojo_core.config import KINDS
from bmojo_core.layers.selection import POLICIES

CASES = [dict(kind=kind) for kind in KINDS]  # the transformer has a window
CASES += [dict(selection=name) for name in sorted(POLICIES) if name != "oracle"]
CASES += [dict(memory_update="token"), dict(wiring="parallel"), dict(num_eidetic_tokens=0)]
CASES += [dict(store_in_window=False), dict(key_kernel=3), dict(fading="scalar_decay")]


@torch.no_grad()
def after(model, tokens):
    return model(tokens, use_cache=True).past_key_values


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_same_logits_and_state_as_the_model(changes):
    model, tokens = peaky.model(**changes), peaky.ids(2, 30)
    cache = after(model, tokens[:, :11])
    before = [t.clone() for t in cache.tensors()]
    graph = DecodeGraph(model, cache)
    places = [t.data_ptr() for t in graph.cache.tensors()]
    got = torch.cat([graph(tokens[:, i : i + 1]) for i in range(11, 30)], 1)
    torch.testing.assert_close(got, peaky.logits(model, tokens)[:, 11:], rtol=1e-10, atol=1e-10)
    assert [t.data_ptr() for t in graph.cache.tensors()] == places
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors(), strict=True))
    assert graph.cache.columns == 30 and graph.cache.position.tolist() == [30, 30]
    assert cache.columns == 11


def test_its_cache_goes_on_anywhere():
    model, tokens = peaky.model(), peaky.ids(1, 20)
    graph = DecodeGraph(model, after(model, tokens[:, :9]))
    graph(tokens[:, 9:10])
    with torch.no_grad():
        rest = model(tokens[:, 10:], past_key_values=graph.cache.map(torch.clone)).logits
    torch.testing.assert_close(
        rest, peaky.logits(model, tokens)[:, 10:], rtol=1e-10, atol=1e-10
    )  # fmt: skip


def test_refuses():
    model, tokens = peaky.model(), peaky.ids(2, 8)
    cache = after(model, tokens)
    with pytest.raises(ValueError, match="at least one token"):
        DecodeGraph(model, BMojoCache())
    with pytest.raises(ValueError, match="evaluation mode"):
        DecodeGraph(peaky.model().train(), cache)
    with pytest.raises(ValueError, match="sublayers"):
        DecodeGraph(peaky.model(num_layers=3), cache)
    with pytest.raises(ValueError, match=r"token must be \(2, 1\)"):
        DecodeGraph(model, cache)(tokens[:1, :1])
    growing = peaky.model("transformer", window=None)
    with pytest.raises(ValueError, match="constant size"):
        DecodeGraph(growing, after(growing, tokens))
