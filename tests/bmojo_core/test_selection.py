"""Claims about registering policies: a summary of the past is kept for those that ask, exactly."""

import peaky
import pytest
import torch
import torch.nn.functional as F

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.layers.selection import NEEDS, POLICIES, register_policy


@pytest.fixture
def seen():
    """What two rules see that differ only in what they ask for; both score alike."""
    calls = {"asks": [], "does_not": []}

    def rule(name):
        def policy(observed):
            calls[name].append(observed)
            return observed.keys.square().sum((-1, -2))

        return policy

    register_policy("asks", needs=("past_key_sum",))(rule("asks"))
    register_policy("does_not")(rule("does_not"))
    yield calls
    for name in calls:
        del POLICIES[name], NEEDS[name]


@torch.no_grad()
def read(selection, lengths):
    model = peaky.model(selection=selection, num_layers=1)
    tokens, cache, logits = peaky.ids(2, sum(lengths)), None, []
    for part in tokens.split(lengths, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("lengths", [[5, 1, 1, 7, 1], [1, 1, 1], [13, 2]])
def test_the_sum_of_keys_is_that_of_the_tokens_before(seen, lengths):
    read("asks", lengths)
    assert len(seen["asks"]) == len(lengths)
    total = torch.zeros_like(seen["asks"][0].keys[:, 0])
    for observed in seen["asks"]:
        torch.testing.assert_close(observed.past_key_sum, total, rtol=1e-6, atol=1e-6)
        total = total + F.normalize(observed.keys, dim=-1).sum(1)


def test_who_does_not_ask_carries_no_sum(seen):
    logits, cache = read("asks", [5, 1, 6])
    same, smaller = read("does_not", [5, 1, 6])
    assert torch.equal(logits, same)
    assert all(observed.past_key_sum is None for observed in seen["does_not"])
    assert cache.nbytes - smaller.nbytes == seen["asks"][0].past_key_sum.nbytes


def test_a_field_that_is_not_on_demand_is_refused():
    with pytest.raises(ValueError, match="past_key_sum.*got .'next_token'"):
        register_policy("prophet", needs=("next_token",))
    assert "prophet" not in POLICIES


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'innovation' is already registered"):
        register_policy("innovation")(lambda seen: seen.position.float())


@pytest.mark.parametrize("rule", ["recency", "key_diversity", "random"])
def test_the_rule_of_a_trained_model_is_exchanged_by_its_configuration(rule):
    sizes = dict(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, window=4)
    config = BMojoConfig.bmojo(**sizes, num_fading_tokens=1, num_eidetic_tokens=4)
    built = BMojoForCausalLM(config).eval()
    meant = BMojoForCausalLM(BMojoConfig.from_dict({**config.to_dict(), "selection": rule})).eval()
    meant.load_state_dict(built.state_dict())
    ids = torch.randint(32, (1, 30))
    with torch.no_grad():
        before = built(ids).logits
        built.config.selection = rule
        state, said = built(ids[:, :20], use_cache=True).past_key_values, []
        for t in range(20, 30):
            out = built(ids[:, t : t + 1], past_key_values=state, use_cache=True)
            said.append(out.logits)
        expected = meant(ids).logits
        torch.testing.assert_close(built(ids).logits, expected)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(torch.cat(said, 1), expected[:, 20:], rtol=1e-4, atol=1e-5)
