"""Somebody else's models, to check ours against: transformers' Mistral and Mamba.

They take the same examples and the same recipe as ours.  Mistral is attention and a gated MLP with
rotary positions; ``layer_types`` of ours with the same sizes has the same parameters.  Its own
initialisation and ours are both normal with a standard deviation of 0.02.  Mamba's are not alike:
`mamba_begun_as_theirs` is our Mamba with the weights theirs begins with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from bmojo_core.convert import from_hf


def mistral(vocab_size: int, **sizes: Any) -> nn.Module:
    """transformers' Mistral; ``sizes`` as its configuration names them."""
    common = dict(vocab_size=vocab_size, tie_word_embeddings=True, use_cache=False)
    return MistralForCausalLM(MistralConfig(**common, attn_implementation="sdpa", **sizes))


def outside_mamba(vocab_size: int, **sizes: Any) -> nn.Module:
    """transformers' Mamba; ``sizes`` as its configuration names them."""
    common = dict(vocab_size=vocab_size, tie_word_embeddings=True, use_cache=False)
    return MambaForCausalLM(MambaConfig(**common, **sizes))


def mamba_begun_as_theirs(vocab_size: int, **sizes: Any) -> nn.Module:
    """Our Mamba with the initial weights of `outside_mamba`, the same for the same seed."""
    return from_hf(outside_mamba(vocab_size, **sizes))


OUTSIDE: dict[str, Callable[..., nn.Module]] = {
    "mistral": mistral,
    "outside_mamba": outside_mamba,
    "mamba_begun_as_theirs": mamba_begun_as_theirs,
}
