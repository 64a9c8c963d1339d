"""The generators of table 3's tasks and of needles do what their definitions say.

Every row is read again by a parser written from the definition alone.
"""

import re
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bmojo_core import tasks
from bmojo_core.tasks import (
    fuzzy_recall,
    induction_heads,
    needle,
    noisy_recall,
    selective_copying,
    string_match_all,
)
from bmojo_core.tasks.text_tokens import TOKENIZERS

SEEDS = st.integers(0, 2**32)


def rows(ids, labels, shape):
    assert ids.shape == labels.shape == shape
    assert ids.dtype == labels.dtype == torch.int64
    return zip(ids.tolist(), labels.tolist(), strict=True)


def answers(label):
    return {t: answer for t, answer in enumerate(label) if answer != -100}


# -- selective copying ----------------------------------------------------------------------------


@given(st.data(), SEEDS)
@settings(max_examples=50)
def test_markers_are_answered_by_the_scattered_tokens_in_order(data, seed):
    n = data.draw(st.integers(1, 9))
    length, vocab = data.draw(st.integers(2 * n, 2 * n + 30)), data.draw(st.integers(3, 40))
    for row, label in rows(*selective_copying(4, length, n, vocab, seed), (4, length)):
        body, tail = row[: length - n], row[length - n :]
        assert tail == [vocab - 1] * n
        scattered = [token for token in body if token]
        assert len(scattered) == n and all(1 <= token < vocab - 1 for token in scattered)
        assert answers(label) == dict(enumerate(scattered, start=length - n))


def test_places_and_tokens_of_selective_copying_are_uniform():
    ids, labels = selective_copying(20_000, 14, 4, 9, seed=5)
    used = (ids[:, :10] != 0).sum(0).numpy()
    assert stats.chisquare(used).pvalue > 1e-4
    token = np.bincount(labels[:, 10:].flatten().numpy(), minlength=8)[1:8]
    assert stats.chisquare(token).pvalue > 1e-4


# -- induction heads ------------------------------------------------------------------------------


@given(st.integers(3, 50), st.integers(3, 30), SEEDS)
@settings(max_examples=50)
def test_the_answer_is_what_followed_the_special_token(length, vocab, seed):
    for row, label in rows(*induction_heads(5, length, vocab, seed), (5, length)):
        special = [t for t, token in enumerate(row) if token == vocab - 1]
        assert len(special) == 2 and special[1] == length - 1
        assert answers(label) == {length - 1: row[special[0] + 1]}
        assert row[special[0] + 1] != vocab - 1 and min(row) >= 0


def test_the_special_token_stands_anywhere():
    ids, labels = induction_heads(20_000, 12, 5, seed=2)
    place = np.bincount((ids == 4).int().argmax(1).numpy(), minlength=10)
    assert len(place) == 10 and stats.chisquare(place).pvalue > 1e-4
    assert stats.chisquare(np.bincount(labels[:, -1].numpy(), minlength=4)).pvalue > 1e-4


# -- noisy and fuzzy recall -----------------------------------------------------------------------


@st.composite
def recall_sizes(draw):
    a, c = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    noise_tokens = draw(st.integers(0, 6))
    vocab = draw(st.integers(2 + noise_tokens + 2 * max(a, c), 40))
    return dict(
        num_examples=draw(st.integers(1, 5)), seq_len=draw(st.integers(2 * (a + c), 70)),
        vocab_size=vocab, key_size=a, value_size=c, min_key_size=draw(st.integers(1, a)),
        noise_vocab_size=noise_tokens, seed=draw(SEEDS), multi_query=draw(st.booleans()),
        noise=draw(st.sampled_from([0.0, 0.3, 0.8])) if noise_tokens else 0.0,
    )  # fmt: skip


def parse(row, vocab, noise_tokens):
    """[(position of the key, key, value)] by the classes of ids; a pair is key tokens, then values.

    Also the classes themselves: p padding, k key, v value, n noise, q prefix.
    """
    keys = (vocab - 2 - noise_tokens) // 2
    classes = "".join(
        "p" if t == 0 else "q" if t == vocab - 1 else "k" if t <= keys
        else "v" if t < vocab - 1 - noise_tokens else "n"
        for t in row
    )  # fmt: skip
    found = [
        (m.start(), tuple(row[m.start(1) : m.end(1)]), tuple(row[m.start(2) : m.end(2)]))
        for m in re.finditer("(k+)(v*)", classes)
    ]
    return found, classes


@given(recall_sizes())
@settings(max_examples=150)
def test_repeated_keys_are_answered_by_their_first_value(size):
    shape = (size["num_examples"], size["seq_len"])
    for row, label in rows(*fuzzy_recall(**size), shape):
        pairs, classes = parse(row, size["vocab_size"], size["noise_vocab_size"])
        single = not size["multi_query"]
        assert re.fullmatch("p*(n|k+v+)*" + "q" * single + "k+v*", classes)
        assert size["noise"] or "n" not in classes
        value_of, expected = {}, {}
        for at, key, value in pairs[:-1]:
            assert size["min_key_size"] <= len(key) <= size["key_size"]
            assert len(value) <= size["value_size"]
            assert len(set(key)) == len(key) and len(set(value)) == len(value)
            if key in value_of and not single:
                expected |= dict(enumerate(value, start=at + len(key) - 1))
            assert value_of.setdefault(key, value) == value
        at, key, value = pairs[-1]  # the last token of this answer is due, and not shown
        assert value_of[key][:-1] == value
        expected |= dict(enumerate(value_of[key], start=at + len(key) - 1))
        assert answers(label) == expected and label[-1] != -100


@given(recall_sizes())
@settings(max_examples=30)
def test_padding_is_shorter_than_a_slot_could_be(size):
    ids, _ = fuzzy_recall(**size)
    padding = (ids == 0).sum(1)
    assert int(padding.max()) < size["key_size"] + size["value_size"]


@given(
    st.integers(4, 60), st.integers(1, 20), st.integers(4, 40), st.sampled_from([0.0, 0.2, 0.7]),
    st.booleans(), SEEDS,
)  # fmt: skip
@settings(max_examples=40)
def test_noisy_recall_is_slots_of_two(length, noise_tokens, others, noise, multi, seed):
    vocab = others + noise_tokens
    made = noisy_recall(3, length, vocab, noise_tokens, noise, multi, seed)
    for row, label in rows(*made, (3, length)):
        _, classes = parse(row, vocab, noise_tokens)
        assert re.fullmatch("p?(kv|nn)+" + ("k" if multi else "qk"), classes)
        assert all(classes[t] == "k" for t in answers(label))


def test_noise_and_asked_keys_come_as_often_as_they_should():
    ids, labels = noisy_recall(4000, 41, 20, 8, noise=0.3, multi_query=False, seed=1)
    # K = 5 keys, 5 values from 6, noise from 11; 41 = padding + 19 slots + prefix + key
    first = ids[:, 1:-2:2]
    assert (ids[:, 0] == 0).all() and first.shape[1] == 19
    share = (first >= 11).double().mean().item()
    expected = 0.3 * 18 / 19  # the slot of the asked pair is never noise
    assert abs(share - expected) < 4 * (0.21 / first.numel()) ** 0.5
    assert stats.chisquare(np.bincount(ids[:, -1].numpy(), minlength=6)[1:]).pvalue > 1e-4
    assert stats.chisquare(np.bincount(labels[:, -1].numpy(), minlength=11)[6:]).pvalue > 1e-4


def test_the_asked_pair_stands_anywhere():
    """With many keys it appears once; the slot is uniform over the 9 that there are."""
    ids, _ = noisy_recall(9000, 19, 4000, 1, noise=0.0, seed=3)
    place = (ids[:, :-1:2] == ids[:, -1:]).int().argmax(1).numpy()
    assert stats.chisquare(np.bincount(place, minlength=9)).pvalue > 1e-4


# -- needles --------------------------------------------------------------------------------------

NEEDLE = re.compile(r"The code of (\S+) is (\S+)\.")
QUESTION = re.compile(r" Which codes were given for (.+)\? The codes of (.+) are$")


@given(
    kind=st.sampled_from(["single", "multikey", "multivalue", "multiquery"]),
    haystack=st.sampled_from(["noise", "needle"]), count=st.integers(2, 4),
    key_type=st.sampled_from(["words", "numbers", "uuids"]),
    value_type=st.sampled_from(["numbers", "uuids"]), tokens=st.sampled_from(["words", "bytes"]),
    room=st.integers(0, 300), seed=SEEDS,
)  # fmt: skip
@settings(max_examples=60)
def test_the_question_asks_for_what_the_text_says(room, **size):
    with pytest.raises(ValueError, match="seq_len must be at least") as refused:
        needle(1, 1, **size)
    length = room + int(re.search(r"at least (\d+)", str(refused.value))[1])
    made = needle(2, length, **size)
    encode, decode = made.tokenizer.encode, made.tokenizer.decode
    everything = list(rows(made.input_ids, made.labels, (2, length)))
    for i, (row, label) in enumerate(everything):
        prompt, wanted, p = made.prompts[i], made.answers[i], int(made.prompt_length[i])
        value_of = {}
        for key, value in NEEDLE.findall(prompt):
            value_of.setdefault(key, []).append(value)
        asked = QUESTION.search(prompt)
        assert asked[1] == asked[2]
        keys = asked[1].split(", ")
        assert list(wanted) == [value for key in keys for value in value_of[key]]
        assert len(set(wanted)) == len(wanted)
        each = size["count"]
        sizes = {"single": (1, 1), "multikey": (1, 1), "multivalue": (1, each)}
        assert (len(keys), len(wanted)) == sizes.get(size["kind"], (each, each))
        if size["haystack"] == "noise":
            others = {"multikey": each, "multiquery": each}
            assert len(value_of) == others.get(size["kind"], 1)
        said = " " + ", ".join(wanted) + "."
        assert decode(row) == prompt + said and encode(prompt) == row[:p]
        end = p + len(encode(said))
        assert answers(label) == dict(enumerate(row[p:end], start=p - 1))
        assert not any(row[end:]) and all(row[:end])


def test_the_haystack_is_as_long_as_fits():
    for tokens in ("words", "bytes"):
        made = needle(3, 1000, haystack="noise", tokens=tokens, seed=4)
        filler = made.tokenizer.count(" The river runs on and the hills stay where they are.")
        left = (made.input_ids == 0).sum(1)
        assert bool((left < filler).all()) and made.prompts[0].count("river") > 10


def test_depth_says_where():
    for depth, place in ((0.0, 0), (0.5, 12), (1.0, 24)):
        made = needle(1, 400, depth=depth, seed=1)
        sentences = re.findall(r"(river|The code of)", made.prompts[0])
        straws = len(sentences) - 1
        assert sentences.index("The code of") == round(depth * straws)
        assert straws > 20 and abs(sentences.index("The code of") - place * straws / 24) <= 1


def test_short_contexts_are_refused_and_never_hang():
    begun = time.process_time()
    for kind in ("single", "multikey", "multivalue", "multiquery"):
        for haystack in ("noise", "needle"):
            with pytest.raises(
                ValueError, match=f"seq_len must be at least \\d+ bytes for kind '{kind}'"
            ):
                needle(10_000, 128, kind, haystack, tokens="bytes", value_type="uuids")
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=126)))
@settings(max_examples=60)
def test_tokens_keep_the_text(name, text):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode([*ids, 0, 0]) == text
    assert len(ids) == tokenizer.count(text)
    assert all(1 <= i < tokenizer.vocab_size for i in ids)


def test_signs_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="printable ASCII, got 'é'"):
        TOKENIZERS["words"]().encode("café")
    with pytest.raises(ValueError, match="ids must be in"):
        TOKENIZERS["words"]().decode([3, 10_000])
    with pytest.raises(ValueError, match="zero bytes"):
        TOKENIZERS["bytes"]().encode("a\0b")


def test_string_match_all_counts_values_named():
    assert string_match_all(["it is ABC and 12."], [("abc", "13")]) == 0.5
    assert string_match_all(["x1", "", "7 8"], [("X1",), ("2",), ("7", "8")]) == pytest.approx(
        2 / 3
    )
    for wrong in (([], []), (["a"], [()]), (["a"], [("a",), ("b",)])):
        with pytest.raises(ValueError, match="answers must be one non-empty tuple"):
            string_match_all(*wrong)


# -- all of them ----------------------------------------------------------------------------------

MAKERS = {
    "selective_copying": lambda n, seed: selective_copying(n, 256, 16, seed=seed),
    "induction_heads": lambda n, seed: induction_heads(n, 256, seed=seed),
    "noisy_recall": lambda n, seed: noisy_recall(n, 128, seed=seed),
    "fuzzy_recall": lambda n, seed: fuzzy_recall(n, 128, seed=seed),
    "needle": lambda n, seed: _tensors(needle(n, 300, "multikey", "needle", seed=seed)),
}


def _tensors(made):
    return made.input_ids, made.labels


@pytest.mark.parametrize("task", MAKERS)
def test_seeds_decide(task):
    first, again, other = (MAKERS[task](20, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not (first[0] == other[0]).all(1).any()


@pytest.mark.parametrize("task", MAKERS)
def test_examples_are_quick(task):
    """By processor time, which the machine's load does not change much."""
    count = 200 if task == "needle" else 10_000
    begun = time.process_time()
    MAKERS[task](count, 0)
    assert time.process_time() - begun < 2.5


def test_blocks_of_rows_join_seamlessly(monkeypatch):
    """Many small blocks: all rows are there, none is a copy of its neighbour."""
    monkeypatch.setattr(sys.modules["bmojo_core.tasks.fuzzy_recall"], "CELLS", 2000)
    ids, labels = fuzzy_recall(50, 40, seed=1)
    assert ids.shape == (50, 40) and (labels[:, -1] != -100).all()
    assert all(not torch.equal(a, b) for a, b in pairwise(ids))


REFUSED = [
    (selective_copying, dict(seq_len=31), "at least 2 \\* num_tokens = 32, got 31"),
    (selective_copying, dict(vocab_size=2), "vocab_size must be an integer >= 3, got 2"),
    (selective_copying, dict(num_tokens=0), "num_tokens must be an integer >= 1"),
    (induction_heads, dict(seq_len=2), "seq_len must be an integer >= 3, got 2"),
    (induction_heads, dict(vocab_size=2.5), "vocab_size must be an integer >= 3, got 2.5"),
    (noisy_recall, dict(noise=1.0), "noise must be in \\[0, 1\\), got 1.0"),
    (noisy_recall, dict(noise=float("nan")), "noise must be in"),
    (noisy_recall, dict(noise_vocab_size=0), "noise_vocab_size must be at least 1 when noise > 0"),
    (noisy_recall, dict(vocab_size=19), "vocab_size must be at least 20"),
    (noisy_recall, dict(seq_len=2), "seq_len must be at least 3, got 2"),
    (noisy_recall, dict(seq_len=3, multi_query=False), "seq_len must be at least 4, got 3"),
    (fuzzy_recall, dict(seq_len=10), "seq_len must be at least 11, got 10"),
    (fuzzy_recall, dict(vocab_size=7), "vocab_size must be at least 8"),
    (fuzzy_recall, dict(min_key_size=4), "min_key_size must be at most key_size = 3, got 4"),
    (fuzzy_recall, dict(key_size=9, vocab_size=8192, seq_len=99), "numbered in 63 bits"),
    (fuzzy_recall, dict(noise_vocab_size=-1), "noise_vocab_size must be an integer >= 0"),
    (needle, dict(kind="double"), "kind must be one of"),
    (needle, dict(haystack="essay"), "haystack must be one of"),
    (needle, dict(key_type="names"), "key_type must be one of"),
    (needle, dict(value_type="words"), "value_type must be one of"),
    (needle, dict(tokens="bpe"), "tokens must be one of"),
    (needle, dict(count=1), "count must be an integer >= 2"),
    (needle, dict(count=5000), "count must be at most"),
    (needle, dict(depth=1.5), "depth must be in"),
    *((f, dict(num_examples=0), "num_examples must be an integer >= 1, got 0")
      for f in (selective_copying, induction_heads, noisy_recall, fuzzy_recall, needle)),
]  # fmt: skip


@pytest.mark.parametrize(("make", "change", "says"), REFUSED)
def test_impossible_sizes_are_refused(make, change, says):
    with pytest.raises(ValueError, match=says):
        make(**{"num_examples": 2, "seq_len": 300, **change})


def test_every_task_is_exported():
    assert {*MAKERS, "mqar", "string_match_all"} <= set(tasks.__all__)
    assert all(callable(getattr(tasks, name)) for name in tasks.__all__)
