"""What a layer asks torch for around its kernels: counted, bounded, and never waited for.

The bounds are what the code reaches; who adds a cast, a copy or a mask to a layer meets them here.
"""

import pytest
import torch

from benchmarks.dispatch import Dispatched, NoWaiting, as_kernels, block, count
from bmojo_core import BMojoConfig, BMojoForCausalLM

# Launches of one block beside its kernels, matrix products included, two rows and more.
MOST = {
    "forward": {"hybrid": 13, "bmojo_f": 24, "bmojo": 30},
    "training": {"hybrid": 40, "bmojo_f": 61, "bmojo": 77},
    "step": {"hybrid": 35, "bmojo_f": 71, "bmojo": 89},
}


@pytest.mark.parametrize("route", MOST)
@pytest.mark.parametrize("kind", ["hybrid", "bmojo_f", "bmojo"])
def test_launches_stay_where_they_are(route, kind):
    seen = count(kind, route)
    assert seen["launches"] <= MOST[route][kind], seen["by_name"]


def test_products_are_those_of_the_equations():
    """SSM: in, x, dt, out; attention: q, k, v, out; fading tokens: k, v.  Twice that backward."""
    assert count("hybrid", "forward")["products"] == 8
    assert count("bmojo", "forward")["products"] == 10
    assert count("bmojo", "training")["products"] == 30


def test_bytes_moved_around_the_kernels():
    """Forward: two additions to the stream, and little that grows with the length."""
    stream = 8 * 2048 * 1024 * 2 / 2**20  # MiB of one (b, l, d) tensor in bfloat16
    assert count("hybrid", "forward")["mib"] <= 6.1 * stream  # two sums: two read, one written
    assert count("bmojo_f", "forward")["mib"] <= 8.1 * stream
    assert count("bmojo", "forward")["mib"] <= 10.9 * stream


def test_counting_finds_what_is_there():
    """The mode against a sum by hand: a product, a cast, an addition; a view costs nothing."""
    x = torch.ones(4, 8)
    with Dispatched() as seen:
        y = (x @ x.T).to(torch.float64)
        y.view(16).add_(1.0)
    assert seen.launches == {"mm": 1, "_to_copy": 1, "add_": 1}
    assert seen.moved == (16 * 4 + 16 * 8) + 2 * 16 * 8


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(),
        lambda x: x[x > 0], lambda x: x.long().bincount(), lambda x: x.unique(),
        lambda x: torch.where(x > 0)[0], lambda x: x.masked_select(x > 0),
    ],
)  # fmt: skip
def test_waiting_is_noticed(waiting):
    with NoWaiting(), pytest.raises(RuntimeError, match="makes the host wait"):
        waiting(torch.ones(4))


@pytest.mark.parametrize("route", ["forward", "training", "step"])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"memory_update": "token", "num_fading_tokens": 2}, {"store_in_window": False},
        {"wiring": "parallel", "memory_gates": True, "key_kernel": 3}, {"position": "rope"},
        {"memory_projections": "separate"}, {"selection": "key_diversity"},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()) or "default",
)  # fmt: skip
def test_nothing_waits_for_the_device(route, changes):
    """A CUDA graph can then take it down.  (On a device other than the CPU, as a GPU is.)"""
    count("bmojo", route, tokens=(2, 1100), preset="tiny", **changes)


@pytest.mark.parametrize("kind", ["transformer", "mamba", "hybrid", "bmojo_f", "bmojo"])
def test_a_whole_model_waits_for_nothing(kind):
    """Embedding, checks of the input, head, gradients: on the meta device nothing can be read."""
    with torch.device("meta"):
        model = BMojoForCausalLM(BMojoConfig.preset("tiny", kind))
    ids = torch.empty(2, 70, dtype=torch.long, device="meta")
    with as_kernels(), NoWaiting():
        model.train()
        model(ids, use_cache=False).logits.sum().backward()
        with torch.no_grad():
            model.eval()
            cache = model(ids, use_cache=True).past_key_values
            for _ in range(2):
                cache = model(ids[:, :1], past_key_values=cache).past_key_values


def test_shapes_of_a_step_never_change():
    """What a step returns has the shapes of what it was given: state in, state out."""
    layers = block("bmojo", preset="tiny")
    x = torch.empty(2, 70, 64, device="meta", dtype=torch.bfloat16)
    start = torch.empty(2, dtype=torch.long, device="meta")
    with as_kernels(), torch.no_grad():
        _, state = layers[0](x, None, None, None, True, None)
        _, later = layers[0](x[:, :1], state, start, None, True, None)
    flat, again = (
        [x for x in torch.utils._pytree.tree_leaves(s) if x is not None] for s in (state, later)
    )
    assert [x.shape for x in flat] == [x.shape for x in again]
