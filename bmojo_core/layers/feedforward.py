"""Position-wise sublayers: the gated MLP, and a mixture of them.

    MLP(u) = W_down (act(W_gate u) * W_up u)
    MoE(u) = sum_{i in top-k of softmax(W_r u)}  softmax(W_r u)_i  MLP_i(u)

They have no memory.  In B'MOJO an SSM takes the MLP's place; here they complete the Transformer
and Jamba, which are special cases of the same stack.

Symbols: b batch, l length, d model width, f inner width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from bmojo_core.config import BMojoConfig


class GatedMLP(nn.Module):
    """W_down (act(W_gate u) * W_up u), (b, l, d) -> (b, l, d)."""

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, f, bias=bias)
        self.up_proj = nn.Linear(d, f, bias=bias)
        self.down_proj = nn.Linear(f, d, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, u: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.down_proj(self.act(self.gate_proj(u)) * self.up_proj(u))


class MixtureOfExperts(nn.Module):
    """Each token goes to its k likeliest experts, weighted by their probabilities.

    The probabilities are those of the full softmax and are not rescaled to sum to one over the
    chosen experts (Jamba's convention).
    """

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(GatedMLP(config) for _ in range(config.num_experts))

    def forward(self, u: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        tokens = u.reshape(-1, u.shape[-1])
        probability = self.router(tokens).softmax(-1, dtype=torch.float32)
        weight, chosen = probability.topk(self.top_k, dim=-1)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            row, slot = (chosen == i).nonzero(as_tuple=True)
            share = weight[row, slot, None].to(tokens.dtype)
            out = out.index_add(0, row, share * expert(tokens[row]))
        return out.reshape(u.shape)
