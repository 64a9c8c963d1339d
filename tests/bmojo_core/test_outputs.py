"""What a call returns, in transformers' conventions: a tuple, hidden states, the loss of a part."""

import peaky
import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def model():
    return peaky.model()


def test_a_tuple_holds_what_there_is(model):
    tokens = peaky.ids(2, 7)
    want = model(tokens, labels=tokens, use_cache=False)
    for said in (model, model.model):
        assert isinstance(said(tokens, return_dict=False), tuple)
    loss, logits = model(tokens, labels=tokens, use_cache=False, return_dict=False)
    assert torch.equal(loss, want.loss) and torch.equal(logits, want.logits)
    model.config.return_dict = False
    assert torch.equal(model(tokens, use_cache=False)[0], want.logits)
    assert torch.equal(model(tokens, use_cache=False, return_dict=True).logits, want.logits)


def test_hidden_states_are_asked_for_by_the_configuration_too(model):
    tokens = peaky.ids(2, 7)
    want = model(tokens, output_hidden_states=True).hidden_states
    assert model(tokens).hidden_states is None
    model.config.output_hidden_states = True
    got = model(tokens).hidden_states
    assert len(got) == 3 and all(map(torch.equal, got, want))
    assert model(tokens, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("keep", [3, torch.tensor([4, 5, 6])])
def test_the_loss_of_the_columns_that_are_kept(model, keep):
    """Row 0 has two pads, row 1 begins only in the last but one column."""
    tokens, mask = peaky.ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = mask[1, :5] = 0
    out = model(tokens, attention_mask=mask, labels=tokens[:, 4:], logits_to_keep=keep)
    logits = model(tokens, attention_mask=mask).logits
    asked = [(0, 5), (0, 6), (1, 6)]  # columns whose predecessor is kept and a token
    want = torch.stack([F.cross_entropy(logits[i, t - 1], tokens[i, t]) for i, t in asked]).mean()
    torch.testing.assert_close(out.loss, want.float())  # transformers' own loss: in float32
    with pytest.raises(ValueError, match=r"labels must be \(b, l\) = \(2, 3\), got \(2, 7\)"):
        model(tokens, attention_mask=mask, labels=tokens, logits_to_keep=keep)


def test_no_loss_across_a_gap_in_what_is_kept(model):
    tokens, kept = peaky.ids(2, 7), torch.tensor([1, 2, 5, 6])
    out = model(tokens, labels=tokens[:, kept], logits_to_keep=kept)
    logits = model(tokens).logits
    want = torch.stack([F.cross_entropy(logits[:, t - 1], tokens[:, t]) for t in (2, 6)]).mean()
    torch.testing.assert_close(out.loss, want.float())


def test_the_state_has_two_names(model):
    """``past_key_values``, and ``cache`` as transformers calls it from 5.24 on."""
    tokens = peaky.ids(2, 7)
    want = model(tokens).logits[:, 4:]
    for said, result in ((model, lambda out: out.logits), (model.model, lambda out: out[0])):
        states = [said(tokens[:, :4], use_cache=True).past_key_values for _ in range(2)]
        old = result(said(tokens[:, 4:], past_key_values=states[0]))
        assert torch.equal(result(said(tokens[:, 4:], cache=states[1])), old)
        assert said(tokens[:, 4:], cache=states[1], use_cache=True).past_key_values is states[1]
        with pytest.raises(ValueError, match="two names of one state"):
            said(tokens[:, 4:], past_key_values=states[0], cache=states[1])
    torch.testing.assert_close(model(tokens[:, 4:], cache=_state(model, tokens)).logits, want)
    inputs = model.prepare_inputs_for_generation(tokens, cache=_state(model, tokens))
    torch.testing.assert_close(model(**inputs).logits, want)


def _state(model, tokens):
    return model(tokens[:, :4], use_cache=True).past_key_values


def test_a_keyword_that_is_nearly_right_is_no_secret(model):
    tokens = peaky.ids(2, 7)
    for said in (model, model.model):
        with pytest.raises(TypeError, match="'atention_mask'; did you mean 'attention_mask'"):
            said(tokens, atention_mask=torch.ones(2, 7))
        said(tokens, cu_seq_lens_q=None, max_length_q=3, num_items_in_batch=None)  # transformers'
    with pytest.raises(TypeError, match="'past_key_value'; did you mean 'past_key_values'"):
        model(tokens, past_key_value=None)
