"""Documents packed into one row do not see each other: each is what it is alone."""

from itertools import pairwise

import peaky
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_invariants import MODELS


def alone(model, documents, scores):
    parts = zip(documents, scores, strict=True)
    return [peaky.logits(model, t[None], memory_scores=s[None])[0] for t, s in parts]


def drawn(lengths, seed):
    documents = [peaky.ids(1, n, seed + i)[0] for i, n in enumerate(lengths)]
    g = torch.Generator().manual_seed(seed)
    return documents, [torch.rand(n, generator=g) for n in lengths]


@settings(max_examples=25)
@given(MODELS, st.lists(st.integers(1, 12), min_size=1, max_size=5), st.booleans(),
       st.integers(0, 99))  # fmt: skip
def test_documents_do_not_see_each_other(changes, lengths, by_position, seed):
    model = peaky.model(seed=seed, **changes)
    documents, scores = drawn(lengths, seed)
    if by_position:
        inputs = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    else:
        inputs = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
    packed, given_scores = torch.cat(documents)[None], torch.cat(scores)[None]
    got = peaky.logits(model, packed, memory_scores=given_scores, **inputs)[0].split(lengths)
    for mine, want in zip(got, alone(model, documents, scores), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-10)


def test_rows_may_be_packed_differently_and_padded():
    model = peaky.model()
    rows = [[5, 3], [9], [2, 2, 2]]
    columns = 12
    tokens, mask = torch.full((3, columns), 7), torch.zeros(3, columns, dtype=torch.long)
    at, expected = torch.zeros(3, columns, dtype=torch.long), []
    for i, lengths in enumerate(rows):
        documents, scores = drawn(lengths, i)
        place = slice(columns - sum(lengths), columns) if i else slice(0, sum(lengths))
        tokens[i, place], mask[i, place] = torch.cat(documents), 1
        at[i, place] = torch.cat([torch.arange(n) for n in lengths])
        expected.append(torch.cat(alone(model, documents, scores)))
    got = peaky.logits(model, tokens, attention_mask=mask, position_ids=at)
    for i, want in enumerate(expected):
        torch.testing.assert_close(got[i][mask[i].bool()], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_loss_and_gradients_are_those_of_the_documents_alone(padding):
    """First tokens of documents and pads are not scored, whatever the labels say."""
    lengths = [6, 4, 7]
    documents, _ = drawn(lengths, 3)
    model = peaky.model().train()
    losses = [model(t[None], labels=t[None]).loss * (len(t) - 1) for t in documents]
    (sum(losses) / (sum(lengths) - len(lengths))).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if padding is None:
        tokens = torch.cat(documents)[None]
        inputs = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    else:
        side = {"padding_value": 5, "batch_first": True, "padding_side": padding}
        tokens = torch.nn.utils.rnn.pad_sequence(documents, **side)
        ones = [torch.ones(n, dtype=torch.long) for n in lengths]
        inputs = {
            "attention_mask": torch.nn.utils.rnn.pad_sequence(ones, **side | {"padding_value": 0})
        }
    model(tokens, labels=tokens, **inputs).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-8, atol=1e-10, msg=name)


def test_positions_that_go_on_from_what_was_read_are_no_new_document():
    model, tokens = peaky.model(), peaky.ids(2, 15)
    with torch.no_grad():
        cache = model(tokens[:, :9], use_cache=True).past_key_values
        at = torch.arange(9, 15)[None]
        got = model(tokens[:, 9:], past_key_values=cache, position_ids=at).logits
    torch.testing.assert_close(got, peaky.logits(model, tokens)[:, 9:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "mask", [[1, 1, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 0]]
)
def test_a_document_may_begin_with_pads(mask):
    model, tokens, edges = peaky.model(), peaky.ids(1, 8), (0, 4, 8)
    given = dict(attention_mask=torch.tensor([mask]), cu_seqlens=torch.tensor(edges))
    got = peaky.logits(model, tokens, **given)[0]
    for begin, end in pairwise(edges):
        here = torch.tensor([j for j in range(begin, end) if mask[j]])
        torch.testing.assert_close(got[here], peaky.logits(model, tokens[:, here])[0])


@pytest.mark.parametrize("packed", [False, True])
def test_no_scored_logit_has_read_its_label(packed):
    """A pad within a row is answered behind all of it, so what follows a hole is not scored."""
    model, tokens = peaky.model(), peaky.ids(1, 10)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 1, 1, 1, 1]])
    inputs = {"attention_mask": mask, "use_cache": False}
    inputs |= {"cu_seqlens": torch.tensor([0, 3, 10])} if packed else {}
    with torch.no_grad():
        loss = float(model(tokens, labels=tokens, **inputs).loss)
        logits = model(tokens, **inputs).logits[0].log_softmax(-1)
    scored = [1, 2, 4, 7, 8, 9] if packed else [1, 2, 3, 4, 7, 8, 9]
    assert loss == pytest.approx(
        -float(sum(logits[t - 1, tokens[0, t]] for t in scored)) / len(scored)
    )


def test_positions_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="position_ids must be"):
        peaky.logits(peaky.model(), peaky.ids(4, 8), position_ids=torch.arange(8).expand(2, 8))
