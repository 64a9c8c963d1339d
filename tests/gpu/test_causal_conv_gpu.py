"""Causal convolution kernels against the float64 reference, with every gradient."""

import pytest
import torch

from bmojo_core.ops.causal_conv import causal_conv1d


def problem(draw, b, l, d, k, dtype, *, full=True):
    optional = dict(bias=draw(d), initial_state=draw(b, k - 1, d, dtype=dtype))
    optional = optional if full else dict(bias=None, initial_state=None)
    return dict(x=draw(b, l, d, dtype=dtype), weight=draw(d, k), **optional)


def run(backend, activation="silu"):
    return lambda **inputs: causal_conv1d(**inputs, activation=activation, backend=backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("l", (1, 2, 63, 500, 2049, 16385))
def test_matches_reference(draw, compare, poisoned, l, dtype):
    inputs = problem(draw, 2, l, 72, 4, dtype)
    poisoned()
    compare(run("gpu"), run("reference"), inputs, dtype)


@pytest.mark.parametrize("k", (2, 3, 7, 12, 32))
@pytest.mark.parametrize("d", (1, 13, 256))
@pytest.mark.parametrize("activation", (None, "silu"))
def test_any_width_and_taps(draw, compare, d, k, activation):
    inputs = problem(draw, 2, 77, d, k, torch.float32, full=activation is None)
    compare(run("gpu", activation), run("reference", activation), inputs, torch.float32)


def test_views_of_wider_tensors(draw, compare):
    inputs = problem(draw, 2, 100, 32, 4, torch.bfloat16)
    inputs["x"] = draw(2, 100, 64, dtype=torch.bfloat16)[..., 32:]
    compare(run("gpu"), run("reference"), inputs, torch.bfloat16)


def test_a_state_is_read_as_it_is(draw):
    """Not rounded to the type of x."""
    inputs = problem(draw, 2, 5, 8, 4, torch.bfloat16)
    inputs["initial_state"] = 100 * draw(2, 3, 8)
    want = run("reference", None)(**{n: x.double() for n, x in inputs.items()})
    got = run("gpu", None)(**inputs)
    assert (got.double() - want).norm() < 4e-3 * want.norm()


@pytest.mark.parametrize("shape", ((8, 2048, 4096), (1, 16384, 1536), (3, 100, 1536)))
def test_tiles_that_fill_a_chip(draw, compare, shape):
    inputs = problem(draw, *shape, 4, torch.bfloat16)
    compare(run("gpu"), run("reference"), inputs, torch.bfloat16)


def test_two_runs_give_the_same_bits(draw):
    inputs = problem(draw, 3, 1000, 136, 4, torch.bfloat16)

    def once():
        leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
        y = run("gpu")(**leaves)
        return [y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))]

    for first, second in zip(once(), once()):
        assert torch.equal(first, second)
