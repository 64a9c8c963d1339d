"""Which models of transformers are special cases of B'MOJO, as a table.

A family says three things: how each block becomes residual sublayers, where each field of our
configuration comes from, and where each module of theirs goes.  ``#`` stands for a block's number;
``{0}`` and ``{1}`` for the places of its first and second sublayer in our flat stack.

==============  ====================================  ============================================
family          a block is                            realization (section 3)
==============  ====================================  ============================================
Mistral, Llama  attention, feedforward                nilpotent: zero last row
Mamba           mamba                                 diagonal: no window
FalconMamba     mamba, plain norms on delta, B, C     diagonal
Jamba           mamba or attention, then feedforward  both, stacked
                or mixture of experts
==============  ====================================  ============================================

Fields of a family's configuration that are neither translated nor ``inert`` (without effect on
the function computed in evaluation mode) are refused unless they have the value they have here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from bmojo_core.config import BMojoConfig

SILU = ("silu", "swish")
ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "yarn")
# Parts of names by which other families say that they compute something else.  The classes of the
# families below ignore such fields; a checkpoint that sets one was made for another function.
FOREIGN = (
    "softcap", "qk_norm", "clip_qkv", "logit_scale", "logits_scaling", "_multiplier",
    "query_pre_attn_scalar", "alibi", "parallel_residual", "attention_sink",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One architecture of transformers as a special case of B'MOJO.

    Attributes
    ----------
    model_type
        transformers' name for it.
    blocks
        The sublayers of every block, from the configuration.
    fields
        Our configuration's field -> theirs.
    modules
        Their module -> ours; the longest match decides, what follows it is kept.
    constants
        Fields of ours that the family fixes.
    only
        Fields of theirs with the values that can be represented.
    inert
        Fields of theirs that do not change the function (initialisation, dropout, kernels).
    through
        Fields of theirs that decide the sublayers, the window or the head width.
    split
        Ending of the name of a stacked weight -> the (name, weight) pairs it holds.
    computed
        Endings of names that some checkpoints store although the configuration determines them.
    """

    model_type: str
    blocks: Callable[[Any], list[tuple[str, ...]]]
    fields: Mapping[str, str]
    modules: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    through: frozenset[str] = frozenset()
    split: Mapping[str, Callable[[Tensor], Iterator[tuple[str, Tensor]]]] = field(
        default_factory=dict
    )
    computed: tuple[str, ...] = ()

    def configuration(self, theirs: PretrainedConfig) -> BMojoConfig:
        """Our configuration of the same function.

        Raises
        ------
        ValueError
            For a feature that B'MOJO does not have, by name.
        """
        if getattr(theirs, "quantization_config", None) is not None:
            raise ValueError(
                f"{self.model_type}: quantization_config cannot be represented; "
                "convert the checkpoint before it is quantized"
            )
        for name, allowed in {**self.only, **self._unknown(type(theirs))}.items():
            value = getattr(theirs, name, allowed[0])
            if value not in allowed:
                raise ValueError(
                    f"{self.model_type}: {name} = {value!r} cannot be represented, "
                    f"only one of {allowed}"
                )
        _refuse_foreign(self.model_type, theirs)
        ours = {mine: getattr(theirs, name) for mine, name in self.fields.items()}
        if "rope_parameters" in ours:
            ours["rope_parameters"] = _rope(self.model_type, ours["rope_parameters"])
        if getattr(theirs, "sliding_window", None) is not None:
            ours["window"] = theirs.sliding_window
        if getattr(theirs, "head_dim", None) is not None:
            ours["head_dim"] = theirs.head_dim
        layers = [sublayer for block in self.blocks(theirs) for sublayer in block]
        no_memory = {"num_fading_tokens": 0, "num_eidetic_tokens": 0}
        return BMojoConfig(**{**no_memory, **ours, **self.constants, "layer_types": layers})

    def reads(self, name: str) -> bool:
        """Whether a field of theirs takes part in the translation."""
        return name in self.through or name in self.only or name in self.fields.values()

    def _unknown(self, theirs: type[PretrainedConfig]) -> dict[str, tuple]:
        """Fields of their class that this table does not know, with the defaults they must have."""
        known = set(PretrainedConfig.__dataclass_fields__) | self.inert
        return {
            name: (description.default,)
            for name, description in theirs.__dataclass_fields__.items()
            if name not in known and not self.reads(name)
        }

    def destination(self, name: str, starts: list[int]) -> str:
        """Our name of their weight; block i begins at sublayer ``starts[i]``.

        Raises
        ------
        ValueError
            When the weight has no place in B'MOJO.
        """
        for pattern in sorted(self.modules, key=len, reverse=True):
            found = re.match(re.escape(pattern).replace(r"\#", r"(\d+)") + r"(?=\.)", name)
            block = int(found[1]) if found and found.groups() else 0
            if found and block < len(starts):
                first = starts[block]
                return self.modules[pattern].format(first, first + 1) + name[found.end() :]
        raise ValueError(f"{self.model_type}: weight {name!r} has no place in a B'MOJO")


def _refuse_foreign(model_type: str, theirs: PretrainedConfig) -> None:
    """Fields of other families that change the function, and activations that have weights."""
    known = type(theirs).__dataclass_fields__
    for name, value in vars(theirs).items():
        neutral = value is None or value is False or (value == 1 and value is not True)
        if name not in known and any(part in name for part in FOREIGN) and not neutral:
            raise ValueError(
                f"{model_type}: {name} = {value!r} cannot be represented; transformers ignores it "
                f"in this family: remove it if that is right"
            )
    act = theirs.hidden_act
    if act in ACT2FN and any(True for _ in ACT2FN[act].parameters()):
        raise ValueError(
            f"{model_type}: hidden_act = {act!r} cannot be represented: it has weights"
        )


def _rope(model_type: str, given: dict[str, Any]) -> dict[str, Any]:
    kind = given.get("rope_type", "default")
    if any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{model_type}: rope_parameters that differ between layers, got {given}")
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{model_type}: rope_parameters['rope_type'] = {kind!r} cannot be represented, only "
            f"one of {ROPE_TYPES} (a key must keep its angle when the text grows)"
        )
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{model_type}: rope_parameters['partial_rotary_factor'] = "
            f"{given['partial_rotary_factor']} cannot be represented, only 1.0"
        )
    return dict(given)


# -- what the families share -------------------------------------------------------------------

_TOKENS = {
    name: name
    for name in ("vocab_size", "hidden_size", "initializer_range", "use_cache",
                 "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
}  # fmt: skip
_ATTENTION = {
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act", "norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
_SSM = {
    "num_layers": "num_hidden_layers", "state_size": "state_size", "conv_kernel": "conv_kernel",
    "expand": "expand", "dt_rank": "time_step_rank", "ssm_bias": "use_bias",
    "conv_bias": "use_conv_bias", "norm_eps": "layer_norm_epsilon",
}  # fmt: skip
_TRANSFORMER_MODULES = {
    "model.embed_tokens": "model.embed_tokens",
    "model.norm": "model.norm",
    "lm_head": "lm_head",
    "model.layers.#.input_layernorm": "model.layers.{0}.norm",
    "model.layers.#.self_attn": "model.layers.{0}.inner.projections",
    "model.layers.#.post_attention_layernorm": "model.layers.{1}.norm",
    "model.layers.#.mlp": "model.layers.{1}.inner",
}
_MAMBA_MODULES = {
    "backbone.embeddings": "model.embed_tokens",
    "backbone.norm_f": "model.norm",
    "lm_head": "lm_head",
    "backbone.layers.#.norm": "model.layers.{0}.norm",
    "backbone.layers.#.mixer": "model.layers.{0}.inner",
}
_JAMBA_MODULES = {
    "model.embed_tokens": "model.embed_tokens",
    "model.final_layernorm": "model.norm",
    "lm_head": "lm_head",
    "model.layers.#.input_layernorm": "model.layers.{0}.norm",
    "model.layers.#.mamba": "model.layers.{0}.inner",
    "model.layers.#.mamba.dt_layernorm": "model.layers.{0}.inner.norms.0",
    "model.layers.#.mamba.b_layernorm": "model.layers.{0}.inner.norms.1",
    "model.layers.#.mamba.c_layernorm": "model.layers.{0}.inner.norms.2",
    "model.layers.#.self_attn": "model.layers.{0}.inner.projections",
    "model.layers.#.pre_ff_layernorm": "model.layers.{1}.norm",
    "model.layers.#.feed_forward": "model.layers.{1}.inner",
}
_MAMBA_INERT = frozenset({
    "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme",
    "time_step_floor", "rescale_prenorm_residual", "use_mambapy", "use_associative_scan",
    "residual_in_fp32",  # where sums are rounded, not what they are
})  # fmt: skip


def _transformer_blocks(c: Any) -> list[tuple[str, ...]]:
    windowed = getattr(c, "sliding_window", None) is not None
    attention = "sliding_attention" if windowed else "attention"
    return [(attention, "feedforward")] * c.num_hidden_layers


def _mamba_blocks(c: Any) -> list[tuple[str, ...]]:
    return [("mamba",)] * c.num_hidden_layers


def _jamba_blocks(c: Any) -> list[tuple[str, ...]]:
    mixers = zip(c.layers_block_type, c.layers_num_experts, strict=True)
    return [(kind, "moe" if experts > 1 else "feedforward") for kind, experts in mixers]


def _gate_and_up(stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(experts, 2f, d) holds W_gate over W_up of every expert."""
    for i, expert in enumerate(stacked):
        gate, up = expert.chunk(2)
        yield f".{i}.gate_proj.weight", gate
        yield f".{i}.up_proj.weight", up


def _down(stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(experts, d, f) holds W_down of every expert."""
    for i, expert in enumerate(stacked):
        yield f".{i}.down_proj.weight", expert


# -- the table ---------------------------------------------------------------------------------

MISTRAL = Family(
    "mistral",
    blocks=_transformer_blocks,
    fields={**_TOKENS, **_ATTENTION, "rope_parameters": "rope_parameters"},
    modules=_TRANSFORMER_MODULES,
    constants={"position": "rope"},
    only={"layer_types": (None,)},
    inert=frozenset({"attention_dropout"}),
    through=frozenset({"sliding_window", "head_dim"}),
    computed=("rotary_emb.inv_freq",),
)
LLAMA = Family(
    "llama",
    blocks=_transformer_blocks,
    fields={
        **MISTRAL.fields, "attention_bias": "attention_bias",
        "attention_output_bias": "attention_bias", "mlp_bias": "mlp_bias",
    },
    modules=_TRANSFORMER_MODULES,
    constants={"position": "rope"},
    only={"layer_types": (None,), "sliding_window": (None,)},
    inert=frozenset({"attention_dropout", "pretraining_tp"}),
    through=frozenset({"head_dim"}),
    computed=("rotary_emb.inv_freq",),
)  # fmt: skip
MAMBA = Family(
    "mamba",
    blocks=_mamba_blocks,
    fields={**_TOKENS, **_SSM},
    modules=_MAMBA_MODULES,
    constants={"num_heads": 1},
    only={"hidden_act": SILU},
    inert=_MAMBA_INERT,
)
FALCON_MAMBA = Family(
    "falcon_mamba",
    blocks=_mamba_blocks,
    fields={**MAMBA.fields, "ssm_norm_eps": "mixer_rms_eps"},
    modules=_MAMBA_MODULES,
    constants={"num_heads": 1, "ssm_norms": "plain"},
    only={"hidden_act": SILU},
    inert=_MAMBA_INERT,
)
JAMBA = Family(
    "jamba",
    blocks=_jamba_blocks,
    fields={
        **_TOKENS, **_ATTENTION, "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_tok", "state_size": "mamba_d_state",
        "conv_kernel": "mamba_d_conv", "expand": "mamba_expand", "dt_rank": "mamba_dt_rank",
        "conv_bias": "mamba_conv_bias", "ssm_bias": "mamba_proj_bias",
    },
    modules=_JAMBA_MODULES,
    constants={"ssm_norms": "learned", "position": "none"},
    only={"hidden_act": SILU, "sliding_window": (None,)},
    inert=frozenset({
        "attention_dropout", "output_router_logits", "router_aux_loss_coef", "use_mamba_kernels",
        "use_mambapy", "use_associative_scan",
    }),
    through=frozenset({
        "attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset",
    }),
    split={"experts.gate_up_proj": _gate_and_up, "experts.down_proj": _down},
)  # fmt: skip

FAMILIES = {f.model_type: f for f in (MISTRAL, LLAMA, MAMBA, FALCON_MAMBA, JAMBA)}

REFUSED = {
    "mamba2": "its scan has one decay a head and a norm before the gate; ours one a channel",
    "bamba": "its state-space layers are Mamba-2's",
    "zamba": "its attention reads the embeddings beside the stream, with weights shared by layers",
    "zamba2": "its state-space layers are Mamba-2's and its attention blocks share weights",
    "recurrent_gemma": "its recurrence is a gated linear unit (RG-LRU), not a selective scan, and "
    "it scales embeddings and caps logits",
    "mixtral": "it rescales the chosen experts' weights to sum to one; ours are the softmax's",
    "gemma": "it scales embeddings and its norms multiply by 1 + weight",
    "gemma2": "it caps logits, scales embeddings and normalises after each sublayer",
    "qwen3": "it normalises queries and keys",
    "gpt2": "it has learned positions, layer norms with biases and an MLP without a gate",
}


def family_of(model_type: str) -> Family:
    """The family of a model type.

    Raises
    ------
    ValueError
        When it is not a special case of B'MOJO that is covered; with the reason where known.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = REFUSED.get(model_type, "no table of its weights has been written")
    raise ValueError(
        f"a model of type {model_type!r} cannot be converted: {reason}. "
        f"Covered are {sorted(FAMILIES)}"
    )
