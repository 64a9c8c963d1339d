"""Somebody else's models, to check ours against: transformers' Mistral and Mamba.

They take the same examples and the same recipe as ours.  Mistral is attention and a gated MLP with
rotary positions; ``layer_types`` of ours with the same sizes has the same parameters.  Its own
initialisation and ours are both normal with a standard deviation of 0.02.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM


def mistral(vocab_size: int, **sizes: Any) -> nn.Module:
    """transformers' Mistral; ``sizes`` as its configuration names them."""
    common = dict(vocab_size=vocab_size, tie_word_embeddings=True, use_cache=False)
    return MistralForCausalLM(MistralConfig(**common, attn_implementation="sdpa", **sizes))


def outside_mamba(vocab_size: int, **sizes: Any) -> nn.Module:
    """transformers' Mamba; ``sizes`` as its configuration names them."""
    common = dict(vocab_size=vocab_size, tie_word_embeddings=True, use_cache=False)
    return MambaForCausalLM(MambaConfig(**common, **sizes))


OUTSIDE: dict[str, Callable[..., nn.Module]] = {"mistral": mistral, "outside_mamba": outside_mamba}
