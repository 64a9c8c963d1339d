"""Claims about registering policies: a summary of the past is kept for those that ask, exactly."""

import peaky
import pytest
import torch
import torch.nn.functional as F

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.inspect import memory_trace
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


@pytest.fixture
def rule():
    """Register a rule called "mine"; it is gone after the test."""
    yield lambda policy: register_policy("mine")(policy)
    POLICIES.pop("mine", None), NEEDS.pop("mine", None)


def test_a_rule_that_is_defined_again_takes_the_place_of_the_first(rule):
    def define(sign):
        def mine(seen):
            return sign * seen.y.square().mean(-1)

        return mine

    model, kept = peaky.model(selection="innovation", num_layers=1), []
    for sign in (1, -1):
        rule(define(sign))
        model.config.selection = "mine"
        (trace,) = memory_trace(model, peaky.ids(1, 20))
        kept.append(trace.remembered())
    assert kept[0] != kept[1]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda seen: seen.position.float()[:, 1:], r"\(b, l\) = \(2, 9\), got \(2, 8\)"),
        (lambda seen: seen.position.float()[:1], r"\(b, l\) = \(2, 9\), got \(1, 9\)"),
        (lambda seen: seen.position / 0 * 0, "must return numbers, got nan"),
    ],
)
def test_scores_that_are_none_are_refused(rule, policy, message):
    rule(policy)
    with pytest.raises(ValueError, match=f"selection policy 'mine' .*{message}"):
        peaky.model(selection="mine")(peaky.ids(2, 9))


def test_a_rule_is_told_what_it_did_not_ask_for(rule):
    rule(lambda seen: seen.past_key_sum.sum((-1, -2)))
    with pytest.raises(AttributeError) as caught:
        peaky.model(selection="mine")(peaky.ids(2, 9))
    assert "past_key_sum" in caught.value.__notes__[0] and "needs=" in caught.value.__notes__[0]


def test_a_name_set_on_the_configuration_is_checked_where_it_is_used():
    model = peaky.model()
    model.config.selection = "inovation"
    with pytest.raises(ValueError, match="selection must be one of .*, got 'inovation'"):
        model(peaky.ids(1, 9))


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


# -- a rule exchanged while texts are being read --------------------------------------------------


def trained(selection):
    return peaky.model(selection=selection, num_layers=1, dtype=torch.float32)


@torch.no_grad()
def begun(model, ids):
    """A state that has been gone on from once."""
    state = model(ids[:, :9], use_cache=True).past_key_values
    model(ids[:, 9:10], past_key_values=state)
    return state


@torch.no_grad()
def test_attention_can_be_counted_by_a_model_built_for_another_rule():
    model, meant = trained("innovation"), trained("accumulated_attention")
    ids = peaky.ids(2, 25)
    model.config.selection = "accumulated_attention"
    torch.testing.assert_close(model(ids).logits, meant(ids).logits)
    torch.testing.assert_close(
        model(ids[:, 10:], past_key_values=begun(model, ids)).logits, meant(ids).logits[:, 10:],
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_a_rule_whose_weights_are_missing_is_refused_and_the_old_one_stays():
    model, ids = trained("innovation"), peaky.ids(1, 12)
    state = begun(model, ids)
    model.config.selection = "learned_predictor"
    with pytest.raises(ValueError, match="selection 'learned_predictor' needs weights"):
        model(ids)
    model.config.selection = "innovation"
    assert model(ids[:, 10:], past_key_values=state).logits.isfinite().all()


@pytest.mark.parametrize("rule", ["key_diversity", "accumulated_attention"])
@pytest.mark.parametrize("more", [1, 3])
def test_a_text_that_kept_too_little_cannot_go_on_under_another_rule(rule, more):
    model, ids = trained("recency"), peaky.ids(1, 20)
    state = begun(model, ids)
    model.config.selection = rule
    model(ids)  # another text begins: from now on the rule holds
    with pytest.raises(ValueError, match=f"selection '{rule}' needs what past_key_values"):
        model(ids[:, 10 : 10 + more], past_key_values=state)


def test_a_learned_rule_can_be_exchanged_for_one_without_weights():
    model, meant = trained("learned_predictor"), trained("recency")
    model.config.selection = "recency"
    ids = peaky.ids(1, 20)
    model.train()(ids, labels=ids).loss.backward()
    assert model.model.layers[0].attention.predictor.grad is None
    weights = {n: p for n, p in model.state_dict().items() if not n.endswith("predictor")}
    meant.load_state_dict(weights)
    assert torch.equal(peaky.logits(model.eval(), ids), peaky.logits(meant, ids))
