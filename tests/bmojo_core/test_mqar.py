"""The generator of associative-recall examples has the properties its definition asks for."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bmojo_core.tasks import mqar


@st.composite
def sizes(draw):
    pairs = draw(st.integers(1, 12))
    length = draw(st.integers(4 * pairs, 4 * pairs + 60))
    vocab = draw(st.integers(2 * pairs + 2, 200))
    return dict(
        num_examples=draw(st.integers(1, 6)), seq_len=length, num_pairs=pairs, vocab_size=vocab,
        filler=draw(st.sampled_from(["zeros", "random"])), seed=draw(st.integers(0, 2**32)),
    )  # fmt: skip


@settings(max_examples=80)
@given(sizes())
def test_every_query_asks_a_stored_key_and_its_label_is_that_keys_value(size):
    ids, labels = mqar(**size)
    n, V = size["num_pairs"], size["vocab_size"]
    assert ids.shape == labels.shape == (size["num_examples"], size["seq_len"])
    assert ids.dtype == labels.dtype == torch.int64
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * n : 2], row[1 : 2 * n : 2]
        assert len(set(keys)) == len(set(values)) == n
        assert all(1 <= k < V // 2 for k in keys) and all(V // 2 <= v < V for v in values)
        asked = [t for t, answer in enumerate(label) if answer != -100]
        assert len(asked) == n and min(asked) >= 2 * n and all((t - 2 * n) % 2 == 0 for t in asked)
        assert sorted(row[t] for t in asked) == sorted(keys)  # every key once
        value_of = dict(zip(keys, values, strict=True))
        assert all(label[t] == value_of[row[t]] for t in asked)
        if size["filler"] == "zeros":
            rest = set(range(2 * n, size["seq_len"])) - set(asked)
            assert all(row[t] == 0 for t in rest)


@given(sizes())
@settings(max_examples=20)
def test_seeds_decide(size):
    first, again = mqar(**size), mqar(**size)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_other_seeds_give_other_examples():
    a, b = (mqar(50, 64, 8, seed=s)[0] for s in (0, 1))
    assert not (a == b).all(1).any()


def test_gaps_follow_the_power_law():
    """The first draw of a law without replacement is the law itself: P(i) ~ i^(a-1)."""
    power, count = 0.3, 40_000
    _, labels = mqar(count, 44, 1, vocab_size=100, power=power, seed=3)
    slot = (labels != -100).int().argmax(1).numpy() // 2 - 1
    law = np.arange(1, 22) ** (power - 1.0)
    expected = count * law / law.sum()
    observed = np.bincount(slot, minlength=21)
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_later_draws_match_draws_without_replacement_one_by_one():
    """Slots used by 2 queries of 5, against numpy's sequential draws."""
    rng = np.random.default_rng(0)
    law = np.arange(1, 6) ** -0.5
    law /= law.sum()
    oracle = np.zeros(5)
    for _ in range(20_000):
        oracle[rng.choice(5, 2, replace=False, p=law)] += 1
    _, labels = mqar(20_000, 14, 2, vocab_size=100, power=0.5, seed=1)
    observed = (labels[:, 4:14:2] != -100).sum(0).numpy()
    assert np.abs(observed / 20_000 - oracle / 20_000).max() < 0.015


def test_keys_are_uniform_where_repetitions_are_likely_and_where_not():
    for vocab in (24, 400):  # permutations; draws again
        ids, _ = mqar(20_000, 40, 10, vocab_size=vocab, seed=2)
        seen = np.bincount(ids[:, 0:20:2].flatten().numpy(), minlength=vocab // 2)[1 : vocab // 2]
        assert stats.chisquare(seen).pvalue > 1e-4


def test_one_hundred_thousand_examples_of_the_hard_panel_are_quick():
    begun = time.process_time()
    mqar(100_000, 256, 64)
    assert time.process_time() - begun < 5.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(num_pairs=17), "at least 4 \\* num_pairs = 68, got 64"),
        (dict(vocab_size=17), "vocab_size must be at least 18"),
        (dict(num_examples=0), "num_examples must be an integer >= 1, got 0"),
        (dict(seq_len=0), "seq_len must be an integer >= 1"),
        (dict(num_pairs=2.5), "num_pairs must be an integer"),
        (dict(filler="noise"), "filler must be 'zeros' or 'random', got 'noise'"),
        (dict(power=0.0), "power must be positive"),
        (dict(power=float("nan")), "power must be positive and finite"),
    ],
)
def test_impossible_sizes_are_refused(change, says):
    arguments = dict(num_examples=2, seq_len=64, num_pairs=8, vocab_size=100)
    with pytest.raises(ValueError, match=says):
        mqar(**{**arguments, **change})
