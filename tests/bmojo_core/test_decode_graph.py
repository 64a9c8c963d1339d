"""A decode step that stays in its own tensors is the decode step; the graph itself needs a GPU."""

import pytest
import torch

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.decode_graph import DecodeGraph, step_in_place

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "window": 8}
MEMORY = {"num_fading_tokens": 2, "num_eidetic_tokens": 6}
CASES = [
    ("mamba", {}), ("hybrid", {}), ("bmojo_f", MEMORY), ("bmojo", MEMORY),
    ("bmojo", {**MEMORY, "memory_update": "token"}), ("bmojo", {**MEMORY, "wiring": "parallel"}),
    ("bmojo", {**MEMORY, "selection": "accumulated_attention"}),
    ("bmojo", {**MEMORY, "fading": "scalar_decay", "key_kernel": 3}),
]  # fmt: skip


def made(kind, changes):
    torch.manual_seed(0)
    return BMojoForCausalLM(getattr(BMojoConfig, kind)(**SIZES, **changes)).eval()


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_a_step_in_place_is_the_step_and_moves_no_tensor(kind, changes):
    model, ids = made(kind, changes), torch.randint(50, (3, 40))
    with torch.no_grad():
        plain = model(ids[:, :15], use_cache=True).past_key_values
        placed = plain.map(torch.Tensor.clone)
        before = [t.data_ptr() for t in placed.tensors()]
        for t in range(15, 40):
            token = ids[:, t : t + 1]
            expected = model(token, past_key_values=plain, use_cache=True).logits[:, -1]
            torch.testing.assert_close(step_in_place(model, token, placed), expected)
    assert [t.data_ptr() for t in placed.tensors()] == before
    for a, b in zip(plain.tensors(), placed.tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_be_captured_is_refused():
    model = made("bmojo", MEMORY)
    with torch.no_grad():
        cache = model(torch.zeros(1, 4, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="model must be on a CUDA device, it is on cpu"):
        DecodeGraph(model, cache)
