"""Conversions: the same logits, the same tokens, every weight once, everything else refused."""

import json
import weakref

import peers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, PretrainedConfig

from bmojo_core import BMojoForCausalLM
from bmojo_core.convert import FAMILIES, from_hf, weights
from bmojo_core.convert.families import REFUSED

LENGTH = 23


def tokens(peer, batch=2, length=LENGTH, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(peer.config.vocab_size, (batch, length), generator=g)


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


@pytest.fixture
def mistral():
    return peers.variant("mistral, window within the text")


@pytest.fixture
def folder(mistral, tmp_path):
    mistral.save_pretrained(tmp_path, max_shard_size="4KB")
    return tmp_path


# -- the same function -------------------------------------------------------------------------


@pytest.mark.parametrize("name", peers.VARIANTS)
def test_same_logits_in_float32(name):
    peer = peers.variant(name)
    ids = tokens(peer)
    want, got = logits(peer, ids), logits(from_hf(peer), ids)
    assert want.std() > 0.3
    assert (got - want).abs().max() <= 1e-4


@pytest.mark.parametrize("name", peers.VARIANTS)
def test_same_logits_in_float64(name, monkeypatch):
    peer = peers.variant(name)
    converted = from_hf(peer, dtype=torch.float64)
    ids = tokens(peer)
    want = logits(peers.in_float64(peer, monkeypatch), ids)
    assert want.dtype == torch.float64
    assert (logits(converted, ids) - want).abs().max() <= 1e-9


@pytest.mark.parametrize("name", peers.VARIANTS)
def test_same_64_greedy_tokens(name):
    peer = peers.variant(name)
    prompt = tokens(peer, length=5)
    greedy = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # transformers' cache keeps every key when the window is 1 (a slice [-0:]); without it, it is 1.
    cached = getattr(peer.config, "sliding_window", None) != 1
    want = peer.generate(prompt, **greedy, use_cache=cached)
    assert want.shape == (2, 69)
    assert torch.equal(from_hf(peer).generate(prompt, **greedy), want)


@settings(max_examples=15)
@given(
    st.sampled_from(["mistral", "llama", "jamba"]), st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 30), st.integers(1, 17),
    st.integers(3, 70), st.integers(0, 99),
)  # fmt: skip
def test_any_size_converts(family, groups, per_group, layers, window, length, vocabulary, seed):
    heads = groups * per_group
    changes = {
        "num_key_value_heads": groups, "num_attention_heads": heads, "vocab_size": vocabulary,
        "num_hidden_layers": layers, "hidden_size": 4 * heads, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "mistral":
        changes["sliding_window"] = window
    peer = peers.build(family, seed, **changes)
    ids = tokens(peer, length=length, seed=seed)
    assert (logits(from_hf(peer), ids) - logits(peer, ids)).abs().max() <= 1e-4


def test_dynamic_frequencies_are_plain_up_to_their_limit_and_refused_beyond():
    """Beyond it transformers turns new keys by other angles than those it has stored."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    peer = peers.build("llama", rope_parameters=rope, max_position_embeddings=LENGTH)
    converted, ids = from_hf(peer), tokens(peer)
    assert (logits(converted, ids) - logits(peer, ids)).abs().max() <= 1e-4
    state = converted(ids, use_cache=True).past_key_values
    for read in (lambda: converted(tokens(peer, length=LENGTH + 1)),
                 lambda: converted(ids[:, :1], past_key_values=state)):  # fmt: skip
        with pytest.raises(ValueError, match="longer than max_position_embeddings 23"):
            read()


def test_same_logits_under_left_padding(mistral):
    ids, mask = tokens(mistral), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :9] = 0
    at = (mask.cumsum(1) - 1).clamp_min(0)
    want = logits(mistral, ids, attention_mask=mask, position_ids=at)
    got = logits(from_hf(mistral), ids, attention_mask=mask)
    assert (got - want)[mask.bool()].abs().max() <= 1e-4


@pytest.mark.parametrize("name", peers.VARIANTS)
def test_a_padded_row_is_what_it_is_alone(name):
    """Also where the original's is not: transformers' Jamba lets a bias into the padding."""
    converted = from_hf(peers.variant(name))
    ids, mask = tokens(converted), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :9] = 0
    got = logits(converted, ids, attention_mask=mask)
    assert (got[0] - logits(converted, ids[:1])).abs().max() <= 1e-4
    assert (got[1, 9:] - logits(converted, ids[1:, 9:])).abs().max() <= 1e-4


# -- every weight exactly once -----------------------------------------------------------------


@pytest.mark.parametrize("name", peers.VARIANTS)
def test_every_weight_is_used_exactly_once(name):
    """Number all entries of all weights: the converted model has every number, once."""
    peer, count = peers.variant(name).double(), 0
    with torch.no_grad():
        for weight in peer.parameters():
            numbers = torch.arange(count, count + weight.numel(), dtype=weight.dtype)
            weight.copy_(numbers.reshape(weight.shape))
            count += weight.numel()
    converted = from_hf(peer)
    found = torch.cat([p.detach().flatten() for p in converted.parameters()]).sort().values
    assert torch.equal(found, torch.arange(count, dtype=torch.float64))
    assert converted.config.parameter_count == count


def test_weights_are_copies(mistral):
    converted = from_hf(mistral)
    before = converted.lm_head.weight.clone()
    with torch.no_grad():
        for weight in mistral.parameters():
            weight.zero_()
    assert torch.equal(converted.lm_head.weight, before)


def test_tied_weights_stay_tied():
    converted = from_hf(peers.variant("llama, biases, tied, gelu"))
    assert converted.lm_head.weight is converted.model.embed_tokens.weight


def edit(folder, change):
    """Rewrite the one-file checkpoint in ``folder`` after ``change`` of its dictionary."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"no weights for \['model.norm.weight'\]"),
        (lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(6)}),
         "'model.layers.0.self_attn.q_norm.weight' has no place"),
        (lambda w: w.update({"score.weight": torch.ones(2)}), "'score.weight' has no place"),
        (lambda w: w.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}),
         "'model.layers.7.mlp.up_proj.weight' has no place"),
        (lambda w: w.update({"model.norm.weight": torch.ones(21)}),
         r"'model.norm.weight' must have shape \(20,\), got \(21,\)"),
        (lambda w: w.update({"model.norm.weight": torch.ones(20).half()}), "give dtype"),
        (lambda w: w.update({"model.norm.weight": torch.ones(20, dtype=torch.int8)}), "dtype"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(mistral, tmp_path, change, message):
    mistral.save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        from_hf(tmp_path)


def test_a_head_that_is_not_the_embedding_is_refused_when_tied(tmp_path):
    peer = peers.variant("mistral, window longer than the text")
    peer.save_pretrained(tmp_path)
    head = peer.lm_head.weight.detach().clone()
    edit(tmp_path, lambda w: w.update({"lm_head.weight": head}))
    assert torch.equal(from_hf(tmp_path).lm_head.weight, head)
    edit(tmp_path, lambda w: w.update({"lm_head.weight": head + 1}))
    with pytest.raises(ValueError, match="both belong in 'model.embed_tokens.weight'"):
        from_hf(tmp_path)


def test_a_weight_stored_twice_is_refused(tmp_path):
    peer = peers.variant("jamba, experts")
    peer.save_pretrained(tmp_path)
    stacked = torch.zeros(3, 20, 27)
    edit(tmp_path, lambda w: w.update({"model.layers.1.feed_forward.experts.down_proj": stacked}))
    with pytest.raises(ValueError, match="both belong"):
        from_hf(tmp_path)


def test_frequencies_stored_by_old_checkpoints_are_recomputed(mistral, tmp_path):
    mistral.save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(tmp_path, lambda w: w.update({name: torch.zeros(3)}))
    ids = tokens(mistral)
    assert torch.equal(logits(from_hf(tmp_path), ids), logits(from_hf(mistral), ids))


# -- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["2KB", "1GB"])
@pytest.mark.parametrize("name", peers.VARIANTS)
def test_a_folder_converts_as_its_model_does(name, shard, tmp_path):
    peer = peers.variant(name)
    peer.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "2KB")
    for mine, other in zip(
        from_hf(str(tmp_path)).named_parameters(), from_hf(peer).named_parameters(), strict=True
    ):
        assert mine[0] == other[0]
        assert torch.equal(mine[1], other[1])


def test_one_tensor_at_a_time_is_in_memory(folder, monkeypatch):
    alive, most = [], 0
    read = weights.stream_folder

    def watched(path):
        nonlocal most
        for name, tensor in read(path):
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            most = max(most, sum(ref() is not None for ref in alive))

    monkeypatch.setattr(weights, "stream_folder", watched)
    assert len(list(folder.glob("*.safetensors"))) > 3
    from_hf(folder, dtype=torch.float32)
    assert len(alive) > 15
    assert most <= 1  # the one that the loop over them still names


def test_a_pickled_checkpoint_is_not_read(mistral, tmp_path, monkeypatch):
    mistral.config.save_pretrained(tmp_path)
    torch.save(mistral.state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    with pytest.raises(ValueError, match=r"'pytorch_model.bin' is a pickle and is not read"):
        from_hf(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, shard = next(iter(index["weight_map"].items()))

    def write(changed):
        path.write_text(json.dumps({**index, "weight_map": changed}))

    write({**index["weight_map"], "model.ghost.weight": shard})
    with pytest.raises(ValueError, match=r"do not agree on \['model.ghost.weight'\]"):
        from_hf(folder)
    write({**index["weight_map"], name: "absent.safetensors"})
    with pytest.raises(ValueError, match="absent.safetensors"):
        from_hf(folder)
    write({**index["weight_map"], name: "../outside.safetensors"})
    with pytest.raises(ValueError, match="must lie in the folder"):
        from_hf(folder)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder with a config.json, got .*nowhere"):
        from_hf(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got int"):
        from_hf(3)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_shard_that_is_cut_short_is_named(folder, kept):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[: int(kept * shard.stat().st_size)])
    with pytest.raises(ValueError, match=f"'{shard.name}' in .* is damaged or cut short"):
        from_hf(folder)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{oops", "config.json in .* is not JSON"),
        ("config.json", "[1]", r"config.json in .* must hold an object, got \[1\]"),
        ("config.json", '{"model_type": "mistral", "hidden_size": "wide"}',
         "transformers refuses config.json in .*hidden_size"),
        ("config.json", '{"model_type": "mistral", "rope_parameters": {"rope_type": "longrope"}}',
         "transformers refuses config.json in .*longrope"),
        ("generation_config.json", "{", "generation_config.json in .* is not JSON"),
        (INDEX, "{oops", f"{INDEX} in .* is not JSON"),
        (INDEX, "{}", f"{INDEX} in .* must have a weight_map, got None"),
        (INDEX, '{"weight_map": {}}', f"{INDEX} in .* must have a weight_map, got {{}}"),
        (INDEX, '{"weight_map": {"a": 3}}', "must lie in the folder, got 3"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(folder, file, text, message):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        from_hf(folder)


def test_a_model_without_generation_settings_converts(mistral):
    mistral.generation_config, ids = None, tokens(mistral)
    assert (logits(from_hf(mistral), ids) - logits(mistral, ids)).abs().max() <= 1e-4


def test_generation_settings_come_along(mistral, folder):
    mistral.generation_config.eos_token_id = [2, 5]
    mistral.generation_config.temperature = 0.5
    mistral.generation_config.do_sample = True
    mistral.save_pretrained(folder)
    for converted in (from_hf(mistral), from_hf(folder)):
        assert converted.generation_config.eos_token_id == [2, 5]
        assert converted.generation_config.temperature == 0.5


def test_a_converted_model_is_saved_and_loaded_as_any_other(mistral, tmp_path):
    converted, ids = from_hf(mistral), tokens(mistral)
    converted.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, BMojoForCausalLM)
    assert torch.equal(logits(again, ids), logits(converted, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_source_dtype_is_kept_or_replaced(mistral, dtype):
    frequency = {
        name: b for name, b in from_hf(mistral).named_buffers() if name.endswith("frequency")
    }
    for converted in (from_hf(mistral, dtype=dtype), from_hf(mistral.to(dtype))):
        assert {p.dtype for p in converted.parameters()} == {dtype}
        for name, mine in converted.named_buffers():
            assert torch.equal(mine, frequency[name])  # angles lose no precision


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "float32", 3])
def test_a_dtype_that_no_model_has_is_refused(mistral, dtype):
    with pytest.raises(ValueError, match="dtype must be None or one of .*torch.float64"):
        from_hf(mistral, dtype=dtype)


def test_the_dtype_of_stored_frequencies_does_not_decide(mistral, tmp_path):
    mistral.half().save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(tmp_path, lambda w: w.update({name: torch.zeros(3)}))
    assert {p.dtype for p in from_hf(tmp_path).parameters()} == {torch.float16}


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_quantized_weights_are_refused_whatever_dtype_is_asked_for(mistral, tmp_path, dtype):
    mistral.save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path, lambda w: w.update({name: w[name].to(dtype)}))
    with pytest.raises(ValueError, match=f"'{name}' has dtype {dtype}.*before it is quantized"):
        from_hf(tmp_path, dtype=torch.float32)


def test_a_model_whose_weights_are_not_there_is_refused():
    config_class, model_class = peers.CLASSES["llama"]
    with torch.device("meta"):
        model = model_class(config_class(**peers._SIZES["llama"]))
    with pytest.raises(ValueError, match="'model.embed_tokens.weight' is on the meta device"):
        from_hf(model, dtype=torch.float32)


def test_weights_that_are_no_tensors_are_refused(mistral):
    mistral.lm_head.__class__ = type(
        "Packed", (torch.nn.Linear,), {"get_extra_state": lambda self: {"packed": b""}}
    )
    with pytest.raises(ValueError, match="'lm_head._extra_state' is not a tensor but a dict"):
        from_hf(mistral)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_a_family_that_is_not_covered_is_refused_with_the_reason(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=f"type '{model_type}' cannot be converted: it"):
        from_hf(tmp_path)


def test_an_unheard_of_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv9"}))
    with pytest.raises(ValueError, match=r"'rwkv9' cannot be converted.*Covered are \['falcon"):
        from_hf(tmp_path)


def test_a_model_in_memory_is_refused_too():
    config = Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, num_hidden_layers=1, state_size=4, n_groups=1
    )
    with pytest.raises(ValueError, match="'mamba2' cannot be converted: its scan"):
        from_hf(Mamba2ForCausalLM(config))


def test_a_model_without_its_head_is_refused(mistral):
    with pytest.raises(ValueError, match=r"'embed_tokens.weight' has no place"):
        from_hf(mistral.model)


_ROPE = {"rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("llama", {"rope_parameters": {
            **_ROPE, "rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3,
        }}, "'longrope'"),
        ("llama", {"rope_parameters": {
            "rope_type": "linear", "rope_theta": 9.0, "factor": 2.0, "partial_rotary_factor": 0.7,
        }}, "partial_rotary_factor"),
        ("llama", {"sliding_window": 4}, "sliding_window = 4"),
        ("jamba", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("mamba", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("falcon_mamba", {"hidden_act": "relu"}, "falcon_mamba: hidden_act"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"hidden_act": "prelu"}, "hidden_act = 'prelu'.*it has weights"),
        ("llama", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30.0"),
        ("mistral", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("mistral", {"use_qk_norm": True}, "use_qk_norm = True"),
        ("llama", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
        ("jamba", {"logits_scaling": 8.0}, "logits_scaling = 8.0"),
    ],
)  # fmt: skip
def test_a_feature_that_cannot_be_represented_is_refused(model_type, changes, message):
    config = peers.CLASSES[model_type][0](**{**peers._SIZES[model_type], **changes})
    with pytest.raises(ValueError, match=message):
        FAMILIES[model_type].configuration(config)


def test_a_foreign_field_that_changes_nothing_is_no_obstacle():
    neutral = {"embedding_multiplier": 1.0, "qk_norm": False, "final_logit_softcapping": None}
    config = peers.CLASSES["llama"][0](**{**peers._SIZES["llama"], **neutral})
    assert FAMILIES["llama"].configuration(config).hidden_size == 20


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.model_type)
def test_every_field_of_a_family_is_translated_or_known_to_be_inert(family):
    fields = peers.CLASSES[family.model_type][0].__dataclass_fields__
    own = set(fields) - set(PretrainedConfig.__dataclass_fields__)
    assert {f for f in own if not family.reads(f)} == family.inert


def test_a_field_that_the_table_does_not_know_must_have_its_default(monkeypatch):
    config_class = peers.CLASSES["mistral"][0]
    config = config_class(**peers._SIZES["mistral"])
    FAMILIES["mistral"].configuration(config)
    monkeypatch.setitem(
        config_class.__dataclass_fields__, "soft_cap",
        type("Field", (), {"default": None}),
    )  # fmt: skip
    FAMILIES["mistral"].configuration(config)
    config.soft_cap = 30.0
    with pytest.raises(ValueError, match="mistral: soft_cap = 30.0 cannot be represented"):
        FAMILIES["mistral"].configuration(config)
