"""Small models on which a mistake shows: logits of order one and attention with sharp peaks.

At the usual initialisation attention is almost uniform and every layer adds little; a token too
many in a memory then changes the output by less than a rounding error would.
"""

import torch
from torch import Tensor, nn

from bmojo_core import BMojoConfig, BMojoForCausalLM

VOCABULARY = 23
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window": 5,
    "num_fading_tokens": 1, "num_eidetic_tokens": 3, "state_size": 4, "innovation_taps": 3,
}  # fmt: skip


@torch.no_grad()
def sharpen(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights for which queries, keys and outputs are of order one; in evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        fan_in = weight.shape[-1] if weight.ndim > 1 else 1
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            std = 2.0 * fan_in**-0.5
        elif "norm" in name or name.endswith(("A_log", "dt_proj.bias", ".D")):
            weight.add_(0.3 * torch.randn(weight.shape, generator=g, dtype=weight.dtype))
            continue
        elif name.endswith(("embed_tokens.weight", "key_conv", "conv1d.weight")):
            std = 0.7
        else:
            std = fan_in**-0.5
        weight.copy_(std * torch.randn(weight.shape, generator=g, dtype=weight.dtype))
    return module.eval()


def model(kind: str = "bmojo", seed: int = 0, dtype=torch.float64, **changes) -> BMojoForCausalLM:
    """A model of one of the five kinds, or of ``layer_types`` given in ``changes``."""
    config = getattr(BMojoConfig, kind)(**{**SIZES, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sharpen(BMojoForCausalLM(config).to(dtype), seed)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids (batch, length)."""
    g = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(VOCABULARY, (batch, length), generator=g)


def logits(model: BMojoForCausalLM, tokens: Tensor, **inputs) -> Tensor:
    """Logits (batch, length, vocabulary) without gradients or state."""
    with torch.no_grad():
        return model(tokens, use_cache=False, **inputs).logits
