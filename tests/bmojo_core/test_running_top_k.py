"""Eidetic memory: Algorithm 1's insertions, one by one, in parallel, and continued."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo_core.ops.innovation import merge_top_k, running_top_k, top_k

FAST = ("cpu", "parallel")

# Few distinct values, so that ties are the rule; -inf and NaN are never stored.
tied_scores = st.sampled_from([0.0, 1.0, 2.0, -1.0, math.inf, -math.inf, math.nan])
any_scores = st.one_of(tied_scores, st.floats(width=32))


@st.composite
def score_batches(draw, elements=any_scores, max_length=40):
    l = draw(st.integers(1, max_length))
    rows = st.lists(st.lists(elements, min_size=l, max_size=l), min_size=1, max_size=3)
    return torch.tensor(draw(rows), dtype=torch.float32)


def by_sorting(scores: list[float], k: int, chunk: int) -> list[list[int]]:
    """Oracle that knows nothing of insertions: sort each prefix by (score, age)."""
    memories = []
    for start in range(0, len(scores), chunk):
        storable = [t for t in range(start) if scores[t] > -math.inf]
        best = sorted(storable, key=lambda t: (-scores[t], t))[:k]
        memories.append(sorted(best))
    return memories


def as_lists(index, valid):
    return [[i[v].tolist() for i, v in zip(*row, strict=True)] for row in zip(index, valid)]


@given(score_batches(), st.integers(0, 50), st.integers(1, 45))
def test_insertion_loop_keeps_the_largest_of_every_prefix(scores, k, chunk):
    found = as_lists(*running_top_k(scores, k, chunk, backend="reference"))
    assert found == [by_sorting(row, k, chunk) for row in scores.tolist()]


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=150)
@given(scores=score_batches(), k=st.integers(0, 50), chunk=st.integers(1, 45))
def test_fast_paths_equal_the_insertion_loop(backend, scores, k, chunk):
    expected = running_top_k(scores, k, chunk, backend="reference")
    found = running_top_k(scores, k, chunk, backend=backend)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("l", [1, 31, 32, 63, 500])
@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_fast_paths_at_length(backend, l, chunk):
    scores = torch.rand(2, l, generator=torch.Generator().manual_seed(l)).mul(50).round()
    expected = running_top_k(scores, 9, chunk, backend="reference")
    for a, b in zip(running_top_k(scores, 9, chunk, backend=backend), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_by_hand(backend):
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0, 5.0, 0.0]])
    index, valid = running_top_k(scores, 2, 2, backend=backend)
    # before 0: nothing; before 2: {0, 1}; before 4: 3.0 at 0 and 2 (2.0 is too small)
    assert index.tolist() == [[[0, 0], [0, 1], [0, 2]]]
    assert valid.tolist() == [[[False, False], [True, True], [True, True]]]
    # before 5: 5.0 enters, and of the equal minima at 0 and 2 the younger leaves
    index, _ = running_top_k(scores, 2, 5, backend=backend)
    assert index[0, 1].tolist() == [0, 4]


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_layout_of_slots(backend):
    scores = torch.tensor([[-math.inf, 2.0, math.nan, 2.0, 1.0]])
    index, valid = running_top_k(scores, 4, 2, backend=backend)
    assert index.shape == valid.shape == (1, 3, 4)
    assert index.dtype == torch.int64
    assert index[0, 2].tolist() == [1, 3, 0, 0]
    assert valid[0, 2].tolist() == [True, True, False, False]


@given(score_batches(), st.integers(1, 20), st.integers(1, 20), st.data())
def test_causal(scores, k, chunk, data):
    """The memory of chunk i does not depend on scores from position i * chunk on."""
    l = scores.shape[1]
    t = data.draw(st.integers(0, l - 1))
    changed = scores.clone()
    changed[:, t:] = data.draw(tied_scores)
    before = t // chunk + 1
    for a, b in zip(running_top_k(scores, k, chunk), running_top_k(changed, k, chunk), strict=True):
        assert torch.equal(a[:, :before], b[:, :before])


def three_memories(scores, cuts, widths):
    parts, start = [], 0
    for length, width in zip(cuts, widths, strict=True):
        s, i, v = top_k(scores[..., start : start + length], width)
        parts.append((s, torch.where(v, i + start, 0), v))
        start += length
    return parts


@given(
    scores=score_batches(),
    k=st.integers(0, 12),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_merge_is_associative_and_empty_is_its_unit(scores, k, share):
    l = scores.shape[1]
    first, second = sorted(round(s * l) for s in share)
    a, b, c = three_memories(scores, (first, second - first, l - second), (k, k, k))
    left = merge_top_k(*merge_top_k(*a, *b, k), *c, k)
    right = merge_top_k(*a, *merge_top_k(*b, *c, k), k)
    whole = top_k(scores, k)
    empty = top_k(scores[:, :0], k)
    for x, y, z in zip(left, right, whole, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
    for side in (merge_top_k(*empty, *a, k), merge_top_k(*a, *empty, k)):
        assert all(torch.equal(x, y) for x, y in zip(side, a, strict=True))


@given(score_batches(max_length=60), st.integers(0, 9), st.integers(1, 7), st.data())
def test_carried_memory_continues_the_selection(scores, k, chunk, data):
    """Chunked prefill: a memory carried to a chunk's edge, merged with what the rest selects."""
    l = scores.shape[1]
    done = data.draw(st.integers(0, (l - 1) // chunk))
    edge = done * chunk
    s, i, v = (part[:, None] for part in top_k(scores[:, :edge], k))
    index, valid = running_top_k(scores[:, edge:], k, chunk)
    rest = scores[:, edge:].gather(1, index.flatten(1)).view(index.shape)
    found = merge_top_k(s, i, v, rest, torch.where(valid, index + edge, 0), valid, k)
    for a, b in zip(found[1:], running_top_k(scores, k, chunk), strict=True):
        assert torch.equal(a, b[:, done:])


def test_merge_takes_memories_of_different_widths():
    a = (torch.tensor([2.0, 5.0]), torch.tensor([3, 4]), torch.tensor([True, True]))
    b = (torch.tensor([2.0]), torch.tensor([9]), torch.tensor([True]))
    scores, index, valid = merge_top_k(*a, *b, 2)
    assert (scores.tolist(), index.tolist(), valid.all().item()) == ([2.0, 5.0], [3, 4], True)
    scores, index, valid = merge_top_k(*a, *b, 5)
    assert index.tolist() == [3, 4, 9, 0, 0]
    assert valid.tolist() == [True, True, True, False, False]
    assert scores.tolist() == [2.0, 5.0, 2.0, -math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype(dtype):
    scores = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = running_top_k(scores.double(), 5, 4, backend="reference")
    for backend in FAST:
        for a, b in zip(running_top_k(scores, 5, 4, backend=backend), expected, strict=True):
            assert torch.equal(a, b)


def test_leaves_its_input_and_its_gradient_alone():
    scores = torch.randn(2, 10, requires_grad=True)
    before = scores.detach().clone()
    for backend in FAST:
        index, _ = running_top_k(scores, 3, 2, backend=backend)
        assert not index.requires_grad
    assert torch.equal(scores, before)


def test_non_contiguous_scores():
    scores = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).T
    expected = running_top_k(scores.contiguous(), 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(running_top_k(scores, 4, 3), expected))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"scores": torch.randn(3)}, "scores"),
        ({"scores": torch.randn(0, 3)}, "scores"),
        ({"scores": torch.randn(3, 0)}, "scores"),
        ({"scores": torch.ones(3, 3, dtype=torch.int64)}, "scores"),
        ({"k": -1}, "k must"),
        ({"k": 1.5}, "k must"),
        ({"chunk": 0}, "chunk"),
        ({"chunk": True}, "chunk"),
        ({"backend": "heap"}, "backend"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_input_names_the_argument(change, names):
    with pytest.raises(ValueError, match=names):
        running_top_k(**{"scores": torch.randn(2, 3), "k": 2, "chunk": 1, **change})


def test_merge_refuses_parts_that_disagree():
    s, i, v = top_k(torch.randn(2, 5), 3)
    with pytest.raises(ValueError, match="valid_b"):
        merge_top_k(s, i, v, s, i, v[:, :2], 3)
    with pytest.raises(ValueError, match="k must"):
        merge_top_k(s, i, v, s, i, v, -1)
    with pytest.raises(ValueError, match="scores"):
        top_k(torch.ones(3, dtype=torch.int64), 2)
