"""What a model refuses: every message names the argument, what was given, what is allowed."""

import numpy as np
import peaky
import pytest
import torch

from bmojo_core import BMojoCache


@pytest.fixture(scope="module")
def model():
    return peaky.model(dtype=torch.float32)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"b >= 1.*got shape \(0, 4\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"l >= 1, got shape \(2, 0\)"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"\(b, l\).*got shape \(4,\)"),
        ({"input_ids": np.zeros((1, 3), int)}, "input_ids must be a torch tensor, got ndarray"),
        ({"input_ids": [[1, 2, 3]]}, "input_ids must be a torch tensor, got list"),
        ({"inputs_embeds": np.zeros((1, 3, 16))}, "inputs_embeds must be a torch tensor, got nda"),
        ({"input_ids": torch.zeros(1, 4)}, "int64 or int32, got torch.float32"),
        ({"input_ids": torch.tensor([[1, 23]])}, r"0\.\.22 \(vocab_size 23\).* from 1 to 23"),
        ({"input_ids": torch.tensor([[1, -1]])}, "values from -1 to 1"),
        ({"inputs_embeds": torch.full((1, 3, 16), float("nan"))}, "inputs_embeds must be finite"),
        ({"inputs_embeds": torch.full((1, 3, 16), float("inf"))}, "inputs_embeds must be finite"),
        ({"inputs_embeds": torch.zeros(1, 3, 15)}, r"\(b, l, 16\).*got shape \(1, 3, 15\)"),
        ({"inputs_embeds": torch.zeros(1, 3, 16, dtype=torch.long)}, "floating dtype"),
        ({"inputs_embeds": torch.zeros(1, 0, 16)}, "l >= 1"),
    ],
)
def test_tokens(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("attention_mask", torch.ones(2, 3), r"attention_mask must be \(b, l\) = \(2, 4\)"),
        ("attention_mask", torch.ones(1, 4), "attention_mask must be"),
        ("attention_mask", torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "at least one token in"),
        ("labels", torch.zeros(2, 3, dtype=torch.long), r"labels must be \(b, l\) = \(2, 4\)"),
        ("labels", np.zeros((2, 4), int), "labels must be a torch tensor, got ndarray"),
        ("labels", [[0] * 4] * 2, "labels must be a torch tensor, got list"),
        ("labels", torch.zeros(2, 4), "labels must be int64, got torch.float32"),
        ("labels", torch.full((2, 4), 23), r"labels must be in 0\.\.22.* got values from 23"),
        ("labels", torch.full((2, 4), -1), "labels must be in .* got values from -1"),
        ("memory_scores", torch.zeros(2, 3), r"memory_scores must be floating \(b, l\) = \(2, 4\)"),
        ("memory_scores", torch.zeros(2, 4, dtype=torch.long), "memory_scores must be floating"),
        ("memory_scores", torch.full((2, 4), float("nan")), "memory_scores must not be NaN"),
        ("position_ids", torch.tensor([[0, 1, 2]]), "position_ids must be"),
        ("position_ids", torch.tensor([[0, 1, 3, 4]]), "position_ids must count 0, 1, 2"),
        ("position_ids", torch.tensor([[3, 4, 5, 6]]), "position_ids must count 0, 1, 2"),
        ("cu_seqlens", torch.tensor([0, 2, 4]), "cu_seqlens must rise .* batch of one row"),
    ],
)
def test_what_goes_with_them(model, name, value, message):
    with pytest.raises(ValueError, match=message):
        model(peaky.ids(2, 4), **{name: value})


@pytest.mark.parametrize("edges", [[0, 3], [1, 4], [0, 2, 2, 4], [0, 3, 2, 4], [4], []])
def test_document_boundaries_must_be_a_partition(model, edges):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to l = 4"):
        model(peaky.ids(1, 4), cu_seqlens=torch.tensor(edges, dtype=torch.long))


def test_documents_have_no_common_state(model):
    with pytest.raises(ValueError, match="use_cache must be False"):
        model(peaky.ids(1, 4), cu_seqlens=torch.tensor([0, 2, 4]), use_cache=True)


def test_a_state_that_does_not_fit(model):
    cache = model(peaky.ids(2, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 2 rows, the batch has 3"):
        model(peaky.ids(3, 1), past_key_values=cache)
    deeper = peaky.model(num_layers=3, dtype=torch.float32)
    with pytest.raises(ValueError, match="holds 2 sublayers, the model has 3"):
        deeper(peaky.ids(2, 1), past_key_values=cache)
    other = peaky.model(dtype=torch.float32).config
    assert other.num_layers == len(cache.states)


def test_a_refused_call_leaves_the_state_as_it_was(model):
    cache = model(peaky.ids(1, 4), use_cache=True).past_key_values
    before = cache.map(torch.clone)
    with pytest.raises(ValueError, match="input_ids must be in"):
        model(torch.tensor([[99]]), past_key_values=cache)
    assert cache.columns == before.columns
    assert all(map(torch.equal, cache.tensors(), before.tensors()))


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.ssm.A_log", "norm.weight"])
def test_weights_that_are_not_finite_are_named(name):
    broken = peaky.model(dtype=torch.float32)
    with torch.no_grad():
        broken.model.get_parameter(name).view(-1)[3::7] = float("nan")
    with pytest.raises(ValueError, match=rf"must be finite.*{name}"):
        broken(torch.arange(23)[None])


def test_oracle_selection_needs_scores():
    oracle = peaky.model(selection="oracle", dtype=torch.float32)
    with pytest.raises(ValueError, match="memory_scores"):
        oracle(peaky.ids(1, 4))


def test_generating_from_columns_already_read(model):
    cache = model(peaky.ids(1, 6), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"beyond the 6 columns .* got 4 columns"):
        model.prepare_inputs_for_generation(peaky.ids(1, 4), past_key_values=cache)


def test_saving_nothing_and_loading_what_is_no_state(tmp_path, model):
    with pytest.raises(ValueError, match="must have read at least one token"):
        BMojoCache().save(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a 'bmojo state 2'"):
        BMojoCache.load(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        BMojoCache.load(tmp_path / "nothing")
