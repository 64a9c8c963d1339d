"""The arithmetic of training memory against what a trained model holds."""

import pytest
import torch

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.training import Recipe, adamw, scored_loss
from bmojo_core.training.memory import training_memory


@pytest.mark.parametrize("kind", ["bmojo", "transformer", "mamba"])
def test_weights_gradients_and_moments_are_counted_exactly(kind):
    config = getattr(BMojoConfig, kind)(vocab_size=32, hidden_size=16, num_layers=2, num_heads=2)
    model = BMojoForCausalLM(config)
    optimizer = adamw(model, Recipe(steps=1).lr_ssm, Recipe(steps=1).lr_attention)
    ids = torch.arange(24).view(2, 12)
    scored_loss(model, ids, ids).backward()
    optimizer.step()
    held = training_memory(config, 1, 2, 12)
    assert held.parameters == sum(p.nbytes for p in model.parameters())
    assert held.gradients == sum(p.grad.nbytes for p in model.parameters())
    moments = (t for s in optimizer.state.values() for n, t in s.items() if n != "step")
    assert held.moments == sum(t.nbytes for t in moments)
    assert held.gathered == 0


def test_shards_divide_and_the_stream_does_not():
    config = BMojoConfig.preset("1.4b")
    one, eight = (training_memory(config, ranks, 4, 2048) for ranks in (1, 8))
    assert one.parameters == 4 * config.parameter_count
    assert eight.moments == pytest.approx(one.moments / 8, abs=8)
    assert eight.stream == one.stream == 2 * 4 * 2048 * 2048 * 30
    blocks = [layer for layer in config.layer_types]
    per_block = (config.parameter_count - 32000 * 2048 - 2048) / len(blocks)
    assert eight.gathered == 4 * (32000 * 2048 + 2048) + 12 * per_block
    assert eight.total == sum(value for _, value in eight.table()[:-1])
    assert training_memory(config, 8, 8, 2048).logits == 2 * eight.logits
    with pytest.raises(ValueError, match="ranks must be at least 1"):
        training_memory(config, 0, 1, 1)


def test_the_printed_table_is_what_the_function_says():
    """docs/scaling.md states the arithmetic for the 1.4b preset; here is where it comes from."""
    import re
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) >= 3
    config = BMojoConfig.preset("1.4b")
    for ranks, batch, printed in rows:
        memory = training_memory(config, int(ranks), int(batch), 2048)
        numbers = [f"{value / 2**30:.1f}" for value in (*vars(memory).values(), memory.total)]
        assert printed.split(" | ") == numbers
