"""Decoding by a replayed graph is decoding, and a step asks the device nothing."""

import pytest
import torch

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.decode_graph import DecodeGraph

SIZES = {"vocab_size": 50, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "window": 16}
MEMORY = {"num_fading_tokens": 2, "num_eidetic_tokens": 6}
CASES = [
    ("mamba", {}), ("hybrid", {}), ("bmojo_f", MEMORY), ("bmojo", MEMORY),
    ("bmojo", {**MEMORY, "memory_update": "token"}), ("bmojo", {**MEMORY, "wiring": "parallel"}),
    ("bmojo", {**MEMORY, "selection": "accumulated_attention"}),
    ("bmojo", {**MEMORY, "fading": "scalar_decay"}),
]  # fmt: skip


ALONE = ("bmojo", MEMORY, 1)  # a single row is compiled with other options


@pytest.mark.parametrize(("kind", "changes", "rows"), [*((*case, 3) for case in CASES), ALONE])
@torch.no_grad()
def test_the_graph_decodes_as_the_model_does(kind, changes, rows):
    torch.manual_seed(0)
    config = getattr(BMojoConfig, kind)(**SIZES, **changes)
    model = BMojoForCausalLM(config).cuda().eval()
    ids = torch.randint(50, (rows, 60), device="cuda")
    plain = model(ids[:, :20], use_cache=True).past_key_values
    graph = DecodeGraph(model, plain.map(torch.Tensor.clone))
    for t in range(20, 60):
        token = ids[:, t : t + 1]
        expected = model(token, past_key_values=plain, use_cache=True).logits[:, -1]
        torch.testing.assert_close(graph(token), expected, rtol=1e-4, atol=1e-5)
    assert graph.cache.columns == plain.columns and torch.equal(
        graph.cache.position, plain.position
    )


@pytest.mark.parametrize(("kind", "changes"), CASES)
@torch.no_grad()
def test_a_decode_step_does_not_wait_for_the_device(kind, changes):
    model = BMojoForCausalLM(getattr(BMojoConfig, kind)(**SIZES, **changes)).cuda().eval()
    ids = torch.randint(50, (2, 20), device="cuda")
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :1], past_key_values=cache, use_cache=True)  # compiles what there is to compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
