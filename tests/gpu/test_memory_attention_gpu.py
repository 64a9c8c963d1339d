"""Window-and-memory attention kernels against the float64 reference, with every gradient."""

import pytest
import torch

from bmojo_core.ops.memory_attention import memory_attention

# l, carried, heads, key heads, width, window, chunk, memory tokens
SHAPES = (
    (1, 7, 2, 2, 32, 8, 16, 4),
    (63, 0, 2, 1, 16, 24, 32, 9),
    (500, 37, 4, 2, 64, 128, 64, 80),
    (500, 0, 4, 4, 24, 100, 30, 5),
    (2049, 511, 2, 1, 16, 512, 512, 130),
    (2049, 0, 2, 2, 16, 512, None, 0),
    (300, 200, 4, 2, 128, 130, 100, 70),
    (700, 5, 2, 2, 64, None, 128, 64),
    (300, 0, 2, 2, 256, 64, 64, 20),
)


def problem(draw, shape, dtype, *, valid=False):
    l, r, h, g, p, window, chunk, m = shape
    b = 2 if l < 2000 else 1
    q = draw(b, l, h, p, dtype=dtype)
    k, v = (draw(b, r + l, g, p, dtype=dtype) for _ in "kv")
    c = 0 if chunk is None else -(-l // chunk)
    mem_k, mem_v = (draw(b, c, m, g, p, dtype=dtype) if m else None for _ in "kv")
    options = dict(window=window, chunk=chunk)
    if valid:
        key_valid = draw(b, r + l) > -0.3
        key_valid[:, : (r + l) // 3] = False  # some queries see no key at all
        options |= dict(key_valid=key_valid)
        if m:
            options |= dict(mem_valid=draw(b, c, m) > 0)
            options["mem_valid"][:, : c // 2] = False
    return dict(q=q, k=k, v=v, mem_k=mem_k, mem_v=mem_v), options


def run(backend, options):
    return lambda **inputs: memory_attention(**inputs, **options, backend=backend)


@pytest.mark.parametrize("valid", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(draw, compare, poisoned, shape, dtype, valid):
    inputs, options = problem(draw, shape, dtype, valid=valid)
    poisoned()
    compare(run("gpu", options), run("reference", options), inputs, dtype)


def test_long_sequence(draw, compare):
    inputs, options = problem(draw, (16385, 0, 1, 1, 64, 96, 64, 16), torch.bfloat16)
    # the dense reference holds (l, l + m) scores: compare a stretch of queries with their own keys
    fast = memory_attention(**inputs, **options, backend="gpu")
    start = 16385 - 1 - 64 * 5  # on a chunk's edge
    part = dict(
        q=inputs["q"][:, start:],
        k=inputs["k"][:, start - 95 :],
        v=inputs["v"][:, start - 95 :],
        mem_k=inputs["mem_k"][:, start // 64 :],
        mem_v=inputs["mem_v"][:, start // 64 :],
    )
    exact = memory_attention(
        **{n: x.double() for n, x in part.items()}, **options, backend="reference"
    )
    assert (fast[:, start:].double() - exact).norm() <= 1e-2 * exact.norm()


def test_memory_for_every_token(draw, compare):
    inputs, options = problem(draw, (100, 0, 2, 1, 32, 16, 1, 8), torch.float32, valid=True)
    compare(run("gpu", options), run("reference", options), inputs, torch.float32)


def test_views_of_wider_tensors(draw, compare):
    inputs, options = problem(draw, (200, 0, 4, 2, 32, 64, 32, 8), torch.bfloat16)
    qkv = draw(2, 200, 8, 32, dtype=torch.bfloat16)
    inputs["q"], inputs["k"], inputs["v"] = qkv.split((4, 2, 2), dim=2)
    compare(run("gpu", options), run("reference", options), inputs, torch.bfloat16)


def test_blind_queries_give_zero(draw):
    inputs, options = problem(draw, (128, 0, 2, 2, 32, 16, 32, 4), torch.bfloat16, valid=True)
    out = memory_attention(**inputs, **options, backend="gpu")
    assert torch.all(out[:, :26] == 0)
    assert out.isfinite().all()


def test_autocast_rounds_nothing_inside(draw):
    """The full causal path, which is torch's own operation."""
    q, k, v = (draw(1, 64, 2, 32) for _ in range(3))
    want = memory_attention(q, k, v, window=None, backend="reference")
    with torch.autocast("cuda", torch.bfloat16):
        got = memory_attention(q, k, v, window=None, backend="gpu")
    assert got.dtype == torch.float32
    assert (got - want).norm() < 1e-4 * want.norm()


def test_two_runs_give_the_same_bits(draw):
    inputs, options = problem(draw, (500, 37, 4, 2, 64, 128, 64, 80), torch.bfloat16, valid=True)

    def once():
        leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
        out = memory_attention(**leaves, **options, backend="gpu")
        return [out, *torch.autograd.grad(out.float().square().sum(), list(leaves.values()))]

    for first, second in zip(once(), once()):
        assert torch.equal(first, second)
