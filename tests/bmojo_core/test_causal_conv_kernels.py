"""The GPU's convolution without a GPU: its kernels and its host code, run by a C++ compiler."""

from functools import partial

import emulated_cuda
import pytest
import torch
from emulated_cuda import apart
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo_core.ops.causal_conv import gpu
from bmojo_core.ops.causal_conv.reference import causal_conv1d_reference

pytestmark = pytest.mark.skipif(
    emulated_cuda.COMPILER is None, reason="no C++ compiler to run the kernels with"
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    """A chip of one multiprocessor whose kernels are those of `emulated_cuda`."""
    with emulated_cuda.small_chip(gpu):
        yield


def compare(inputs, activation, tolerance):
    """Output and every gradient, against the reference in float64."""
    given = {n: x for n, x in inputs.items() if x is not None}
    leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
    wide = {n: x.detach().double().requires_grad_() for n, x in given.items()}
    absent = dict.fromkeys(("bias", "initial_state"))
    y = gpu.causal_conv1d_gpu(**absent | leaves, activation=activation)
    want = causal_conv1d_reference(**absent | wide, activation=activation)
    assert y.dtype == inputs["x"].dtype and apart(y, want) < tolerance
    weight = torch.randn(want.shape).to(y.dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), weight)
    expected = torch.autograd.grad(want, list(wide.values()), weight.double())
    for name, a, b in zip(leaves, gradients, expected, strict=True):
        assert a.dtype == leaves[name].dtype and a.shape == b.shape
        assert apart(a, b) < tolerance, name


def problem(b, l, d, k, dtype, bias=True, initial=True, state_dtype=None):
    return dict(
        x=torch.randn(b, l, d).to(dtype), weight=torch.randn(d, k),
        bias=torch.randn(d) if bias else None,
        initial_state=torch.randn(b, k - 1, d).to(state_dtype or dtype) if initial else None,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 3), l=st.integers(1, 150), d=st.sampled_from((1, 3, 4, 8, 12)),
    bias=st.booleans(), initial=st.booleans(), activation=st.sampled_from((None, "silu")),
    dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 99),
    chip=st.sampled_from((1, 8, 132)),
)  # fmt: skip
def test_four_taps(b, l, d, bias, initial, activation, dtype, seed, chip):
    """Lengths shorter than the filter, ragged groups, one tile and many, with and without past."""
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_multiprocessors", lambda _: chip)
        patch.setattr(gpu, "SHORTEST", 1 + seed % 20)
        compare(problem(b, l, d, 4, dtype, bias, initial), activation, TOLERANCE[dtype])


@pytest.mark.parametrize("k", [1, 2, 3, 7, 9, 17, 32])
@pytest.mark.parametrize("l", [1, 2, 40])
def test_any_number_of_taps(k, l):
    torch.manual_seed(k)
    compare(problem(2, l, 8, k, torch.float32, initial=k > 1), "silu", 1e-5)


@pytest.mark.parametrize("part", [slice(8, 16), slice(5, 13)])
def test_views_of_wider_tensors(part):
    """Rows that lie apart; the second cannot be read eight bytes at a time."""
    torch.manual_seed(0)
    inputs = problem(2, 50, 8, 4, torch.bfloat16)
    inputs["x"] = torch.randn(2, 50, 24).bfloat16()[..., part]
    inputs["initial_state"] = torch.randn(2 * 3 * 8 + 1)[1:].reshape(2, 3, 8)  # no 16 bytes either
    compare(inputs, "silu", 1e-2)


def test_a_state_is_read_as_it_is():
    """Not rounded to x's type: a state of size 100 would lose a half."""
    torch.manual_seed(0)
    inputs = problem(1, 6, 4, 4, torch.bfloat16, state_dtype=torch.float32)
    inputs["initial_state"] *= 100
    wide = {n: x.double() for n, x in inputs.items()}
    want = causal_conv1d_reference(**wide, activation=None).bfloat16()
    assert torch.equal(gpu.causal_conv1d_gpu(**inputs), want)


def test_everything_is_written_once(monkeypatch):
    """No element of the outputs keeps what was in memory before."""
    monkeypatch.setattr(gpu.torch, "empty", partial(emulated_cuda.poisoned, dtype=torch.float32))
    inputs = problem(2, 77, 12, 4, torch.float32)
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    y = gpu.causal_conv1d_gpu(**leaves, activation="silu")
    gradients = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.parametrize(
    ("b", "l", "d", "vector", "blocks", "tile"),
    [
        (8, 2048, 4096, 4, 5, 205),  # 10 tiles of 8192 threads: 0.97 of 84480
        (8, 2048, 1536, 4, 4, 94),  # 22 of 3072: all of 67584
        (1, 5, 8, 4, 5, 5),  # too short to be cut
        (64, 2048, 4096, 4, 5, 2048),  # a tile alone fills the chip
    ],
)
def test_tiles_fill_the_chip(b, l, d, vector, blocks, tile):
    assert gpu._tile(l, b * d // vector, gpu.THREADS * blocks * 132) == tile
