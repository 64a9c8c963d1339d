"""Small random models of transformers, of odd sizes, to compare conversions with."""

import peaky
import torch
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

CLASSES = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mamba": (MambaConfig, MambaForCausalLM),
    "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM),
    "jamba": (JambaConfig, JambaForCausalLM),
}
_ATTENTION = {
    "vocab_size": 37, "hidden_size": 20, "intermediate_size": 27, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip
_SSM = {"vocab_size": 31, "hidden_size": 15, "state_size": 3, "num_hidden_layers": 2}
_JAMBA = {
    **{k: v for k, v in _ATTENTION.items() if k != "head_dim"},
    "mamba_d_state": 3, "mamba_d_conv": 3, "num_hidden_layers": 3, "num_experts": 3,
    "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
}  # fmt: skip
_SIZES = {
    "mistral": _ATTENTION, "llama": _ATTENTION, "mamba": _SSM, "falcon_mamba": _SSM,
    "jamba": _JAMBA,
}  # fmt: skip
_ROPE = {"rope_theta": 100.0, "original_max_position_embeddings": 8, "factor": 4.0}

VARIANTS = {
    "mistral, window within the text": ("mistral", {"sliding_window": 5}),
    "mistral, window longer than the text": (
        "mistral", {"sliding_window": 99, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "mistral, no window": ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "mistral, one layer, window 1": ("mistral", {"sliding_window": 1, "num_hidden_layers": 1}),
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama, biases, tied, gelu": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
         "hidden_act": "gelu", "num_key_value_heads": 1, "rms_norm_eps": 1e-2},
    ),
    "llama, rope llama3": (
        "llama",
        {"rope_parameters": {**_ROPE, "rope_type": "llama3", "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0}, "max_position_embeddings": 32},
    ),
    "llama, rope linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}},
    ),
    "mistral, rope yarn": (
        "mistral",
        {"rope_parameters": {**_ROPE, "rope_type": "yarn"}, "max_position_embeddings": 32,
         "sliding_window": 7},
    ),
    "mamba": ("mamba", {}),
    "mamba, one layer, biases": (
        "mamba",
        {"num_hidden_layers": 1, "use_bias": True, "use_conv_bias": False, "conv_kernel": 2,
         "time_step_rank": 2, "expand": 1, "tie_word_embeddings": False},
    ),
    "falcon_mamba": ("falcon_mamba", {"mixer_rms_eps": 1e-2, "layer_norm_epsilon": 1e-4}),
    "jamba, experts": ("jamba", {}),
    "jamba, dense, one layer of attention": (
        "jamba",
        {"num_hidden_layers": 1, "num_experts": 1, "num_experts_per_tok": 1,
         "attn_layer_period": 1, "attn_layer_offset": 0, "num_key_value_heads": 4},
    ),
    "jamba, biases, tied": (
        "jamba",
        {"mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True,
         "expert_layer_period": 3, "num_key_value_heads": 1, "mamba_expand": 1},
    ),
}  # fmt: skip


def build(model_type: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model of a family, with sharp attention and logits of order one."""
    config_class, model_class = CLASSES[model_type]
    peer = model_class(config_class(**{**_SIZES[model_type], **changes}))
    if model_type == "jamba":  # the default, grouped products, takes neither odd sizes nor float64
        peer.set_experts_implementation("eager")
    return peaky.sharpen(peer, seed)


def variant(name: str, seed: int = 0) -> PreTrainedModel:
    """One of ``VARIANTS``."""
    model_type, changes = VARIANTS[name]
    return build(model_type, seed, **changes)


def in_float64(peer: PreTrainedModel, monkeypatch) -> PreTrainedModel:
    """The same function without the roundings to float32 that its code has built in."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for module in peer.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = _rms_norm(module)
        if hasattr(module, "residual_in_fp32"):
            module.residual_in_fp32 = False
    return peer.double()


def _rms_norm(module: nn.Module):
    def forward(x):
        weight = module.weight.double()
        return nn.functional.rms_norm(x, weight.shape, weight, module.variance_epsilon)

    return forward
