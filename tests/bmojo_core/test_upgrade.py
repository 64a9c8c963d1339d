"""Memory added to a converted model: nothing changes at first, and it can be learned."""

import peaky
import peers
import pytest
import torch
from torch.nn.functional import cross_entropy

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.convert import from_hf, upgrade

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
MEMORY = {"num_fading_tokens": 2, "num_eidetic_tokens": 3}


def converted(name):
    return from_hf(peers.variant(name), dtype=torch.float64)


def ids(model, length, batch=2):
    g = torch.Generator().manual_seed(length)
    return torch.randint(model.config.vocab_size, (batch, length), generator=g)


def pair(name, **settings):
    model = converted(name)
    return model, upgrade(model, **{**MEMORY, **settings})


ANY_LENGTH = {
    "mistral, window within the text": {},
    "mistral, one layer, window 1": {"num_fading_tokens": 0, "fading": "scalar_decay"},
    "mistral, rope yarn": {"selection": "recency", "memory_projections": "shared"},
    "mamba": {"window": 4, "num_heads": 3, "num_kv_heads": 1},
    "falcon_mamba": {"window": 4, "num_eidetic_tokens": 0, "num_heads": 3},
    "mamba, one layer, biases": {"window": 3, "attention_output_bias": True},
}


@pytest.mark.parametrize("update", ["chunk", "token"])
@pytest.mark.parametrize("name", ANY_LENGTH)
def test_the_same_function_at_any_length(name, update):
    model, upgraded = pair(name, memory_update=update, **ANY_LENGTH[name])
    tokens = ids(model, 31)
    torch.testing.assert_close(peaky.logits(upgraded, tokens), peaky.logits(model, tokens), **CLOSE)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(upgraded.generate(tokens, **greedy), model.generate(tokens, **greedy))


@pytest.mark.parametrize("name", ["llama", "mistral, no window", "jamba, experts"])
def test_full_attention_gets_a_window_and_stays_the_same_within_it(name):
    model, upgraded = pair(name, window=9)
    tokens = ids(model, 14)
    before, after = peaky.logits(model, tokens), peaky.logits(upgraded, tokens)
    torch.testing.assert_close(after[:, :9], before[:, :9], **CLOSE)
    assert (after - before)[:, 9:].abs().amax(-1).min() > 1e-3  # and only within it


def test_what_is_new_and_what_is_kept():
    model, upgraded = pair("mistral, window within the text")
    assert upgraded.config.layer_types == ["bmojo", "feedforward"] * 2
    assert upgraded.config.memory_chunk == upgraded.config.window == 5
    assert sum(p.numel() for p in upgraded.parameters()) == upgraded.config.parameter_count
    block, attention = upgraded.model.layers[0], model.model.layers[0].inner.projections
    assert torch.equal(block.attention.memory_k_proj.weight, attention.k_proj.weight)
    assert torch.equal(block.attention.memory_v_proj.weight, attention.v_proj.weight)
    assert block.ssm.out_proj.weight.abs().min() > 0
    with torch.no_grad():
        block.attention.projections.q_proj.weight.zero_()
    assert attention.q_proj.weight.abs().min() > 0  # a copy


def test_new_heads_share_no_keys_unless_asked_to():
    mamba = converted("mamba")
    assert upgrade(mamba, window=4, num_heads=3).config.num_kv_heads == 3
    assert upgrade(mamba, window=4, num_heads=3, num_kv_heads=1).config.num_kv_heads == 1
    idle = from_hf(peers.build("jamba", num_hidden_layers=1))  # heads configured, none in use
    assert idle.config.layer_types == ["mamba", "feedforward"]
    assert upgrade(idle, window=4).config.num_kv_heads == idle.config.num_kv_heads == 2
    assert upgrade(idle, window=4, num_heads=5).config.num_kv_heads == 5


def test_the_seed_decides_the_new_weights_and_nothing_else():
    model = converted("mistral, window within the text")
    torch.manual_seed(5)
    first, draw = upgrade(model, seed=3), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), draw)
    same, other = upgrade(model, seed=3).state_dict(), upgrade(model, seed=4).state_dict()
    weights = first.state_dict()
    assert all(torch.equal(weights[n], same[n]) for n in weights)
    name = "model.layers.0.ssm.in_proj.weight"
    assert not torch.equal(weights[name], other[name])


@pytest.mark.parametrize("name", ["mistral, window within the text", "mamba"])
def test_gates_have_a_gradient_and_old_weights_keep_theirs(name):
    model, upgraded = pair(name, **ANY_LENGTH[name])
    tokens = ids(model, 20)
    for m in (model, upgraded):
        m(tokens, labels=tokens).loss.backward()
    kept = dict(model.named_parameters())["model.embed_tokens.weight"].grad
    new = dict(upgraded.named_parameters())
    torch.testing.assert_close(new["model.embed_tokens.weight"].grad, kept, **CLOSE)
    closed = "_gate" if name.startswith("mistral") else "o_proj.weight"
    gates = [n for n in new if n.endswith(closed)]
    assert len(gates) == (4 if name.startswith("mistral") else 2)
    for gate in gates:
        assert new[gate].detach().abs().max() == 0
        assert new[gate].grad.abs().min() > 1e-9, gate


def test_after_one_step_everything_new_has_a_gradient():
    _, model = pair("mistral, window within the text")
    tokens = ids(model, 26)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        step.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        step.step()
    for name, weight in model.named_parameters():
        assert weight.grad.abs().max() > 0, name


def test_open_gates_are_the_block_without_gates():
    gated = peaky.model(memory_gates=True)
    plain = BMojoForCausalLM(BMojoConfig.bmojo(**peaky.SIZES)).double().eval()
    weights = {n: w for n, w in gated.state_dict().items() if not n.endswith("_gate")}
    plain.load_state_dict(weights)
    with torch.no_grad():
        for name, weight in gated.named_parameters():
            if name.endswith("_gate"):
                weight.fill_(1.0)
    tokens = peaky.ids(2, 23)
    torch.testing.assert_close(peaky.logits(gated, tokens), peaky.logits(plain, tokens), **CLOSE)


@pytest.mark.parametrize("update", ["chunk", "token"])
@pytest.mark.parametrize("wiring", ["stacked", "parallel"])
def test_gated_blocks_read_in_pieces_as_they_read_at_once(update, wiring):
    model = peaky.model(memory_gates=True, memory_update=update, wiring=wiring)
    assert sum(p.numel() for p in model.parameters()) == model.config.parameter_count
    tokens = peaky.ids(2, 23)
    want = peaky.logits(model, tokens)
    for cuts in ([9], [3, 10, 11], list(range(1, 23))):
        cache, out = None, []
        for begin, end in zip([0, *cuts], [*cuts, 23], strict=True):
            with torch.no_grad():
                result = model(tokens[:, begin:end], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            out.append(result.logits)
        torch.testing.assert_close(torch.cat(out, 1), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {}, "window must be given"),
        ("mamba", {}, "window must be given"),
        ("mistral, window within the text", {"window": 8}, "window must stay 5.*got 8"),
        ("mistral, window within the text", {"num_heads": 2}, "cannot change 'num_heads'"),
        ("mamba", {"window": 4, "state_size": 8}, "cannot change 'state_size'"),
        ("llama", {"window": 4, "selction": "random"}, "cannot change 'selction'"),
        ("llama", {"window": 4, "selection": "best"}, "selection must be one of"),
        ("llama", {"window": 0}, "window must be an integer >= 1, got 0"),
        ("llama", {"window": 4, "num_eidetic_tokens": -1}, "num_eidetic_tokens must be"),
    ],
)
def test_what_cannot_be_upgraded_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        upgrade(converted(name), **settings)


@pytest.mark.parametrize("name", ["mistral, no window", "mamba"])
def test_a_model_that_is_not_converted_is_refused(name):
    with pytest.raises(ValueError, match="model must be a BMojoForCausalLM, as from_hf returns it"):
        upgrade(peers.variant(name), window=4)


def test_a_model_with_memory_is_not_upgraded_again():
    with pytest.raises(ValueError, match="must not have 'bmojo'"):
        upgrade(peaky.model())
    model = converted("llama")
    with pytest.raises(ValueError, match="must not have 'bmojo'"):
        upgrade(upgrade(model, window=4), window=4)


# -- learning ----------------------------------------------------------------------------------

SYMBOLS, MARK, BLANK, WINDOW = 12, 12, 13, 8


def recall(count, gap, seed):
    """A symbol, ``gap`` blanks, a mark, the symbol again: (count, gap + 3)."""
    g = torch.Generator().manual_seed(seed)
    symbol = torch.randint(SYMBOLS, (count, 1), generator=g)
    return torch.cat(
        [symbol, torch.full((count, gap), BLANK), torch.full((count, 1), MARK), symbol], 1
    )


def loss_of(model, text):
    return cross_entropy(model(text[:, :-1]).logits[:, -1].float(), text[:, -1])


def train(model, gaps, steps, seed):
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for i in range(steps):
        gap = gaps[int(torch.randint(len(gaps), (1,), generator=g))]
        optimizer.zero_grad()
        loss_of(model, recall(32, gap, 1000 * seed + i)).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def recalled(model, gap):
    text = recall(200, gap, 77)
    return (model(text[:, :-1]).logits[:, -1].argmax(-1) == text[:, -1]).double().mean().item()


def test_memory_beyond_the_window_is_learned():
    """A Mistral that recalls within its window of 8 learns to recall from far beyond it.

    The same training without memory stays at guessing one of 12 symbols.
    """
    mistral = peers.build(
        "mistral", vocab_size=14, hidden_size=32, intermediate_size=48, head_dim=8,
        num_hidden_layers=1, sliding_window=WINDOW,
    )  # fmt: skip
    torch.manual_seed(0)
    checkpoint = train(BMojoForCausalLM(from_hf(mistral).config), [0, 2, 4], 250, seed=1)
    assert recalled(checkpoint, 4) > 0.95
    upgraded = upgrade(checkpoint, num_fading_tokens=0, num_eidetic_tokens=8)
    assert recalled(upgraded, 24) == recalled(checkpoint, 24) < 0.25
    train(upgraded, [4, 12, 24], 200, seed=2)
    control = train(checkpoint, [4, 12, 24], 200, seed=2)
    assert recalled(control, 24) < 0.25
    assert min(recalled(upgraded, gap) for gap in (4, 12, 24, 100)) > 0.9
