"""Innovation and running top-k kernels: float64 reference and Algorithm 1's own loop."""

import pytest
import torch

from bmojo_core.ops.innovation import innovation, running_top_k


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("l", (1, 63, 500, 2049, 16385))
def test_innovation_matches_reference(draw, compare, poisoned, l, dtype):
    d, taps = (1100 if l < 1000 else 72), 4
    inputs = dict(
        y=draw(2, l, d, dtype=dtype), weights=draw(taps), past=draw(2, taps, d, dtype=dtype)
    )
    poisoned()

    def run(backend):
        return lambda **x: innovation(**x, taps=taps, backend=backend)

    compare(run("gpu"), run("reference"), inputs, dtype)


@pytest.mark.parametrize("taps, d", ((1, 13), (2, 64), (9, 40)))
def test_innovation_of_views_without_past(draw, compare, taps, d):
    inputs = dict(y=draw(2, 70, 2 * d)[..., :d], weights=None, past=None)

    def run(backend):
        return lambda **x: innovation(**x, taps=taps, backend=backend)

    compare(run("gpu"), run("reference"), inputs, torch.float32)


def scores_of(kind, draw, b, l):
    scores = draw(b, l)
    if kind == "tied":
        return (2 * scores).round()
    if kind == "equal":
        return torch.zeros(b, l, device="cuda")
    if kind == "padded":
        scores[:, l // 2 :] = -torch.inf
        scores[0, 0] = torch.nan
    if kind == "rising":
        return torch.arange(l, device="cuda").float().expand(b, l)
    return scores


@pytest.mark.parametrize("kind", ("random", "tied", "equal", "padded", "rising"))
@pytest.mark.parametrize(
    "b, l, k, chunk", ((2, 63, 5, 7), (1, 500, 64, 100), (2, 2049, 300, 512), (1, 100, 200, 1))
)
def test_running_top_k_is_algorithm_1(draw, poisoned, b, l, k, chunk, kind):
    scores = scores_of(kind, draw, b, l)
    poisoned()
    index, valid = running_top_k(scores, k, chunk, backend="gpu")
    want_index, want_valid = running_top_k(scores.cpu(), k, chunk, backend="reference")
    assert torch.equal(valid.cpu(), want_valid)
    assert torch.equal(index.cpu(), want_index)


def test_running_top_k_over_a_long_sequence(draw):
    scores = draw(2, 16385)
    got = running_top_k(scores, 256, 512, backend="gpu")
    want = running_top_k(scores.cpu(), 256, 512, backend="parallel")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want))
