"""Autocast rounds what enters an operation, never what it does inside: float32 stays float32."""

import warnings

import pytest
import torch

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.ops import memory_attention, scalar_scan, selective_scan


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scan(operation, l, backend="auto"):
    """A function of the dtype that returns output and last state."""
    b, d, n = 2, 12, 8
    heads = 3 if operation is scalar_scan else d
    A = -noise(heads).abs() if operation is scalar_scan else -noise(d, n).abs()
    given = dict(
        u=noise(b, l, d), delta=noise(b, l, heads, seed=1).abs(), A=A, B=noise(b, l, n, seed=2),
        C=noise(b, l, n, seed=3), D=noise(d), z=noise(b, l, d, seed=4),
        initial_state=noise(b, d, n, seed=5),
    )  # fmt: skip

    def run(dtype, backend=backend):
        wide = {name: x.to(dtype) for name, x in given.items()}
        return operation(**wide, return_last_state=True, backend=backend)

    return run


def attention(chunk, memory=True, backend="auto", window=16):
    q, k, v = (noise(1, 64, 2, 16, seed=s) for s in range(3))
    memories = [noise(1, 64 // chunk, 3, 2, 16, seed=s) for s in (3, 4)] if memory else []

    def run(dtype, backend=backend):
        given = (x.to(dtype) for x in (q, k, v, *memories))
        return (memory_attention(*given, window=window, chunk=chunk, backend=backend),)

    return run


CASES = {
    "selective scan": scan(selective_scan, 70), "selective step": scan(selective_scan, 1),
    "scalar scan": scan(scalar_scan, 70), "scalar step": scan(scalar_scan, 1),
    "attention in blocks": attention(16), "attention in tables": attention(1),
    "causal attention": attention(16, memory=False, window=None),
    "attention's reference": attention(16, backend="reference"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_rounded_inside(name):
    wide = CASES[name](torch.float64, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = CASES[name](torch.float32)
    for a, want in zip(got, wide, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - want).norm() < 1e-6 * want.norm()


@pytest.mark.parametrize("norms", [None, "learned"])
def test_no_norm_falls_back_to_a_slow_one(norms):
    """torch warns where input and weight of a norm differ in dtype, and computes it in pieces."""
    torch.manual_seed(0)
    model = BMojoForCausalLM(BMojoConfig.preset("tiny", "bmojo", ssm_norms=norms))
    ids = torch.randint(0, 256, (2, 40))
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
            warnings.simplefilter("error")
            loss = model(ids, labels=ids).loss
    finally:
        torch.set_warn_always(False)
    wide = model(ids, labels=ids).loss
    assert abs(loss - wide) < 0.02 * wide
