"""One configuration, five kinds of equal size, and nothing accepted that is not understood."""

import json

import peaky
import pytest
import torch

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.config import KINDS, PRESETS, SUBLAYERS

NOMINAL = {
    "10m": 10e6, "30m": 30e6, "130m": 130e6, "370m": 370e6, "790m": 790e6, "1.4b": 1.4e9,
    "3b": 3e9,
}  # fmt: skip


def instantiated(config: BMojoConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in BMojoForCausalLM(config).parameters())


FADINGS = pytest.mark.parametrize("fading", ["selective", "scalar_decay"])


@FADINGS
@pytest.mark.parametrize("preset", PRESETS)
def test_five_kinds_have_the_same_number_of_parameters(preset, fading):
    counts = {}
    for kind in KINDS:
        config = BMojoConfig.preset(preset, kind, fading=fading)
        assert config.kind == kind
        counts[kind] = config.parameter_count
        assert instantiated(config) == counts[kind]
    assert max(counts.values()) <= 1.03 * min(counts.values()), counts


@FADINGS
def test_presets_are_as_large_as_their_names_say(fading):
    assert set(PRESETS) == {"tiny", *NOMINAL}
    for preset, nominal in NOMINAL.items():
        for kind in KINDS:
            count = BMojoConfig.preset(preset, kind, fading=fading).parameter_count
            assert abs(count / nominal - 1) <= 0.05, (preset, kind, count)


@pytest.mark.parametrize(
    "changes",
    [
        {"wiring": "parallel"},
        {"memory_projections": "separate", "num_kv_heads": 1, "attention_bias": True},
        {"num_fading_tokens": 0, "num_eidetic_tokens": 0, "memory_projections": "separate"},
        {"normalize_fading": False, "key_kernel": 3},
        {"ssm_norms": "learned", "ssm_bias": True, "conv_bias": False, "dt_rank": 3},
        {"fading": "scalar_decay", "ssm_head_dim": 4, "ssm_norms": "learned", "dt_rank": 3},
        {"ssm_norms": "plain", "head_dim": 6, "attention_output_bias": True},
        {"tie_word_embeddings": False, "expand": 1.5, "intermediate_size": 40, "mlp_bias": True},
        {"num_experts": 3, "num_experts_per_tok": 2, "layer_types": list(SUBLAYERS)},
    ],
)
def test_parameter_count_is_the_instantiated_count(changes):
    types = {"layer_types": ["bmojo", "mamba", "attention", "feedforward"]}
    config = BMojoConfig(**{**peaky.SIZES, **types, **changes})
    assert instantiated(config) == config.parameter_count


def test_every_setting_survives_a_round_trip(tmp_path):
    config = BMojoConfig.bmojo(
        **peaky.SIZES, wiring="parallel", memory_update="token", selection="random",
        selection_seed=7, store_in_window=False, fading_stride=2, normalize_fading=False,
        normalize_innovation=True, memory_projections="separate", key_kernel=2, position="rope",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, eos_token_id=3,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = BMojoConfig.from_pretrained(tmp_path)
    ours, theirs = config.to_dict(), again.to_dict()
    assert {k: v for k, v in ours.items() if theirs[k] != v} == {}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bmojo"


@FADINGS
def test_derived_widths_survive_a_round_trip(fading):
    for kind in KINDS:
        config = BMojoConfig.preset("tiny", kind, fading=fading)
        assert BMojoConfig.from_dict(config.to_dict()).parameter_count == config.parameter_count


def test_a_configuration_from_before_the_choice_is_selective():
    fields = BMojoConfig.bmojo(hidden_size=32).to_dict()
    del fields["fading"], fields["ssm_head_dim"]
    config = BMojoConfig.from_dict(fields)
    assert (config.fading, config.state_size) == ("selective", 16)


def test_heads_that_fade_alike():
    """64 channels a head where the width allows, 64 states; a Mamba stack takes whole heads."""
    config = BMojoConfig.preset("130m", fading="scalar_decay")
    assert (config.ssm_head_dim, config.state_size) == (64, 64)
    mamba = BMojoConfig.mamba(hidden_size=96, fading="scalar_decay", ssm_head_dim=24)
    assert mamba.ssm_intermediate_size % 24 == 0
    with pytest.raises(ValueError, match="ssm_head_dim must divide .* 128 .* got 24"):
        BMojoConfig.bmojo(hidden_size=64, fading="scalar_decay", ssm_head_dim=24)
    with pytest.raises(ValueError, match="fading must be one of .* got 'eternal'"):
        BMojoConfig.bmojo(fading="eternal")


def test_the_paper_transformer_attends_to_everything_unless_given_a_window():
    assert "attention" in BMojoConfig.preset("tiny", "transformer").layer_types
    assert "sliding_attention" in BMojoConfig.preset("tiny", "transformer", window=8).layer_types
    assert "sliding_attention" in BMojoConfig.preset("tiny", "hybrid").layer_types


@pytest.mark.parametrize(
    ("key", "hint"),
    [("windw", "window"), ("num_eidetic_token", "num_eidetic_tokens"), ("hiden_size", "hidden")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_key_is_refused_with_a_hint(kind, key, hint):
    with pytest.raises(ValueError, match=rf"'{key}'.*did you mean '{hint}"):
        getattr(BMojoConfig, kind)(**{key: 3})


def test_an_unknown_key_like_no_other_is_refused_too():
    with pytest.raises(ValueError, match="unknown configuration key 'zzzzzz'"):
        BMojoConfig(zzzzzz=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"window": 2.5}, "window must be an integer >= 1, got 2.5"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"num_layers": True}, "num_layers must be an integer"),
        ({"num_fading_tokens": -1}, "num_fading_tokens must be an integer >= 0, got -1"),
        ({"num_eidetic_tokens": -1}, "num_eidetic_tokens must be an integer >= 0, got -1"),
        ({"innovation_taps": 0}, "innovation_taps must be"),
        ({"fading_stride": 0}, "fading_stride must be"),
        ({"memory_chunk": 0}, "memory_chunk must be"),
        ({"head_dim": 0}, "head_dim must be"),
        ({"selection_seed": "a"}, "selection_seed must be"),
        ({"wiring": "serial"}, r"wiring must be one of \('stacked', 'parallel'\), got 'serial'"),
        ({"memory_update": "never"}, "memory_update must be one of"),
        ({"memory_projections": "none"}, "memory_projections must be one of"),
        ({"selection": "best"}, "selection must be one of .*innovation.*got 'best'"),
        ({"position": "alibi"}, "position must be one of"),
        ({"ssm_norms": "batch"}, "ssm_norms must be one of"),
        ({"hidden_act": "sillu"}, "hidden_act must be one of"),
        ({"layer_types": ["mamba", "mlp"]}, "layer_types must be a list of entries of"),
        ({"layer_types": "mamba"}, "layer_types must be a list"),
        ({"layer_types": []}, "layer_types must be a list"),
        ({"hidden_size": 30, "num_heads": 4}, "num_heads must divide hidden_size 30"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must divide num_heads 4, got 3"),
        ({"expand": 0}, "expand must be"),
        ({"expand": float("nan")}, "expand must be"),
        ({"norm_eps": -1.0}, "norm_eps must be positive"),
        ({"norm_eps": "x"}, "norm_eps must be positive and finite, got 'x'"),
        ({"initializer_range": True}, "initializer_range must be positive and finite, got True"),
        ({"expand": "2"}, "expand must be finite .* got '2'"),
        ({"expand": float("inf")}, "expand must be finite .* got inf"),
        ({"layer_types": [["bmojo"]]}, "layer_types must be a list of entries of"),
        ({"layer_types": 3}, "layer_types must be a list of entries of"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings must be an integer >= 1"),
        ({"rope_parameters": 5}, "rope_parameters must be a dictionary or None, got 5"),
        ({"layer_types": ["moe"], "num_experts": 2}, "num_experts_per_tok must be in 1..num"),
        ({"position": "rope", "head_dim": 3}, "head_dim must be even for position='rope', got 3"),
    ],
)
def test_values_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        BMojoConfig(**given)


def test_a_window_of_zero_is_refused_for_every_kind():
    for kind in KINDS:
        with pytest.raises(ValueError, match="window"):
            getattr(BMojoConfig, kind)(window=0)


def test_unknown_presets_and_kinds_are_refused():
    with pytest.raises(ValueError, match=r"preset name must be one of .*'130m'.*got '131m'"):
        BMojoConfig.preset("131m")
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'rnn'"):
        BMojoConfig.preset("tiny", "rnn")


def test_rope_types_that_change_with_length_are_refused():
    config = BMojoConfig(position="rope", rope_parameters={"rope_type": "longrope"})
    with pytest.raises(ValueError, match=r"rope_type.*'longrope'"):
        BMojoForCausalLM(config)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_rope_types_without_their_parameters_are_refused(kind):
    config = BMojoConfig(position="rope", rope_parameters={"rope_type": kind, "rope_theta": 1e4})
    with pytest.raises(ValueError, match=f"rope_parameters must have '.*' for rope_type '{kind}'"):
        BMojoForCausalLM(config)
