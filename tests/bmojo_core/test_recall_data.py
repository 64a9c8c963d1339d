"""Pools hold what the generators make, whatever the task; kept shares count what is held."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.evaluation import accuracy_per_example
from bmojo_core.experiments.kept import kept_shares
from bmojo_core.experiments.outside import OUTSIDE
from bmojo_core.experiments.packed import Job, load_records, ours, run_jobs
from bmojo_core.experiments.recall_data import TASKS, answers, compact, make_pool
from bmojo_core.tasks import mqar

TASKS_HERE = {
    "selective_copying": {"seq_len": 20, "vocab_size": 8, "num_tokens": 4},
    "induction_heads": {"seq_len": 20, "vocab_size": 8, "evaluate_lengths": [40]},
    "noisy_recall": {"seq_len": 20, "vocab_size": 20, "noise_vocab_size": 8},
    "fuzzy_recall": {"seq_len": 24, "vocab_size": 14, "key_size": 2, "value_size": 2},
}
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "window": 4, "state_size": 4,
         "num_eidetic_tokens": 6, "num_fading_tokens": 1}  # fmt: skip


def task(name):
    return {"task": name, **TASKS_HERE[name], "examples": 40, "held_out": 24}


def labels_of(examples):
    """The labels (N, L) that positions and targets stand for."""
    labels = torch.full(examples.ids.shape, -100)
    rows, places = (examples.targets != -100).nonzero(as_tuple=True)
    at = examples.positions[rows, places].long()
    labels[rows, at] = examples.targets[rows, places].long()
    return labels


@pytest.mark.parametrize("name", TASKS)
def test_a_pool_holds_the_generators_examples(name):
    pool = make_pool(task(name))
    options = {
        k: v for k, v in TASKS_HERE[name].items() if k not in ("seq_len", "evaluate_lengths")
    }
    length = TASKS_HERE[name]["seq_len"]
    ids, labels = TASKS[name](40, length, seed=0, **options)
    (train,) = pool.train.values()
    assert torch.equal(train.ids.long(), ids) and torch.equal(labels_of(train), labels)
    for held_length, held in pool.held_out.items():
        ids, labels = TASKS[name](24, int(held_length), seed=10_000, **options)
        assert torch.equal(held.ids.long(), ids) and torch.equal(labels_of(held), labels)


@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_compact_keeps_every_label_in_order(data):
    rows, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    scored = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length),
                           min_size=rows, max_size=rows)))  # fmt: skip
    scored[0, 0] = True
    labels = torch.where(scored, torch.arange(rows * length).reshape(rows, length), -100)
    made = compact(torch.zeros(rows, length, dtype=torch.long), labels, torch.zeros(length))
    assert torch.equal(labels_of(made), labels)
    used = made.targets != -100
    assert torch.equal(used.sum(1), scored.sum(1))
    assert torch.equal(used, torch.arange(used.shape[1]) < used.sum(1, keepdim=True))


@pytest.mark.parametrize("name", TASKS)
def test_accuracy_is_that_of_the_plain_path(name):
    torch.manual_seed(0)
    pool = make_pool(task(name))
    model = BMojoForCausalLM(BMojoConfig.bmojo(vocab_size=pool.vocab_size, **SIZES)).eval()
    for length, accuracy in pool.evaluate(model, tokens=100).items():
        held = pool.held_out[length]
        plain = accuracy_per_example(model, held.ids.long(), labels_of(held), batch_size=7)
        assert abs(accuracy - float(plain.mean())) < 1e-4


def test_longer_held_out_sets_have_names_and_oracles_of_their_own():
    held = {"examples": 8, "held_out": 4, "evaluate_lengths": [96]}
    pool = make_pool({"seq_len": 24, "pairs": [2, 4], "vocab_size": 32, **held})
    assert list(pool.held_out) == ["2", "4", "2@96", "4@96"]
    ids, labels = mqar(4, 96, 4, vocab_size=32, seed=10_004)
    held = pool.held_out["4@96"]
    assert torch.equal(held.ids.long(), ids) and torch.equal(labels_of(held), labels)
    assert held.useful.nonzero()[:, 0].tolist() == [1, 3, 5, 7] and held.useful.shape == (96,)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task must be one of .*'fuzzy_recall'.*got 'juggling'"):
        make_pool({"task": "juggling", "seq_len": 8, "vocab_size": 8})


@pytest.mark.parametrize(("selection", "values", "keys"), [("oracle", 1.0, 0.5), ("recency", 0, 0)])
def test_kept_shares_count_what_the_last_memory_holds(selection, values, keys):
    pool = make_pool({"seq_len": 24, "pairs": [4], "vocab_size": 32, "examples": 8, "held_out": 8})
    config = BMojoConfig.bmojo(vocab_size=32, **SIZES, selection=selection)
    shares = kept_shares(BMojoForCausalLM(config).eval(), pool.held_out["4"])
    # six places: the oracle's four values and, of equal scores, the two oldest others
    assert shares == {"0": {"values": values, "keys": keys}}


OUTSIDE_SIZES = {
    "mistral": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": None},
    "outside_mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "mamba_begun_as_theirs": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", OUTSIDE)
def test_transformers_own_models_run_through_the_same_engine(kind, tmp_path):
    data = {"seq_len": 24, "pairs": [2], "vocab_size": 32, "examples": 16, "held_out": 8}
    job = Job(kind, OUTSIDE_SIZES[kind], data, steps=2, batch=4)
    assert run_jobs([job], tmp_path, say=lambda line: None) == 1
    (record,) = load_records(tmp_path)
    model = OUTSIDE[kind](vocab_size=32, **OUTSIDE_SIZES[kind]).eval()
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert (record["state_bytes"] is None) == (not ours(model))
    assert "kept" not in record["evaluations"][0]
    pool = make_pool(data)
    buffers = pool.buffers(4)
    buffers = buffers[pool.draw(buffers, random.Random(0), torch.Generator().manual_seed(0))]
    at = buffers.positions.long()
    logits = answers(model, buffers.ids, buffers.positions, buffers.scores)
    whole = model(input_ids=buffers.ids.long()).logits
    expected = whole.gather(1, at[..., None].expand(-1, -1, whole.shape[-1]))
    torch.testing.assert_close(logits, expected)
