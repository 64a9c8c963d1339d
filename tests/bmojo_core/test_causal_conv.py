"""Claims about the causal convolution: fast path, gradients, causality, carrying its tail."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from torch import Tensor

from bmojo_core.ops import causal_conv1d


def make_inputs(b: int, l: int, d: int, k: int, seed: int = 0) -> list[Tensor]:
    """Float64 x, weight, bias, initial_state."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, l, d), (d, k), (d,), (b, k - 1, d))
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


def output_and_gradients(inputs: list[Tensor], activation: str | None, backend: str):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = causal_conv1d(*leaves, activation, backend)
    g = torch.Generator().manual_seed(7)
    weight_y = torch.randn(y.shape, generator=g, dtype=torch.float64)
    return y.detach(), *torch.autograd.grad((y.double() * weight_y).sum(), leaves)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("l", [1, 31, 32, 63, 500])
@pytest.mark.parametrize("d, k", [(1, 1), (5, 4), (17, 2), (40, 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_cpu_equals_reference(activation, l, d, k, dtype, tolerance):
    inputs = [t.to(dtype) for t in make_inputs(3, l, d, k)]
    want = output_and_gradients([t.double() for t in inputs], activation, "reference")
    got = output_and_gradients(inputs, activation, "cpu")
    for expected, result in zip(want, got):
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(backend, activation):
    leaves = [t.requires_grad_() for t in make_inputs(2, 6, 3, 4)]
    assert torch.autograd.gradcheck(lambda *a: causal_conv1d(*a, activation, backend), leaves)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_each_channel_is_a_finite_filter(backend):
    """scipy's lfilter with the taps newest first."""
    x, weight, bias, _ = make_inputs(1, 50, 3, 4)
    want = [lfilter(weight[c].flip(0), [1.0], x[0, :, c]) + bias[c].item() for c in range(3)]
    y = causal_conv1d(x, weight, bias, backend=backend)
    np.testing.assert_allclose(y[0].numpy(), np.stack(want, 1), rtol=0, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(l=st.integers(2, 40), cut=st.integers(1, 39), k=st.integers(1, 6), seed=st.integers(0, 999))
def test_two_pieces_equal_one(l, cut, k, seed):
    """Carrying the last k-1 inputs continues the filter exactly, however short the pieces."""
    x, weight, bias, past = (t.float() for t in make_inputs(2, l, 7, k, seed))
    m = min(cut, l - 1)
    tail = torch.cat([past, x[:, :m]], 1)[:, m:]
    pieces = [
        causal_conv1d(x[:, :m], weight, bias, past, "silu"),
        causal_conv1d(x[:, m:], weight, bias, tail, "silu"),
    ]
    whole = causal_conv1d(x, weight, bias, past, "silu")
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(t=st.integers(0, 19), k=st.integers(1, 5))
def test_causal_and_no_longer_than_its_taps(t, k):
    """A change at t moves outputs t to t+k-1 and no other."""
    x, weight, bias, past = (v.float() for v in make_inputs(1, 20, 3, k))
    changed = x.clone()
    changed[:, t] += 1
    moved = causal_conv1d(changed, weight, bias, past) != causal_conv1d(x, weight, bias, past)
    where = moved.any(-1).flatten().nonzero().flatten().tolist()
    assert where == list(range(t, min(t + k, 20)))


@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_rounds_once(dtype, eps):
    inputs = [t.to(dtype) for t in make_inputs(2, 40, 9, 4)]
    y = causal_conv1d(*inputs, "silu")
    want = causal_conv1d(*(t.double() for t in inputs), "silu")
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want, rtol=eps, atol=1e-5)


def test_non_contiguous_inputs_and_gradients():
    x, weight, bias, past = make_inputs(2, 33, 6, 4)
    x = torch.cat([x, x], -1).chunk(2, -1)[0].requires_grad_()
    weight = weight.T.contiguous().T
    assert not x.is_contiguous() and not weight.is_contiguous()
    grads = []
    for backend in ("reference", "cpu"):
        y = causal_conv1d(x, weight, bias, past, "silu", backend)
        grads.append(torch.autograd.grad(y.sum(), x)[0])  # the gradient that comes in is expanded
    torch.testing.assert_close(*grads, rtol=0, atol=1e-13)


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads(threads):
    inputs = make_inputs(5, 300, 64, 4)
    want = output_and_gradients(inputs, "silu", "reference")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = output_and_gradients(inputs, "silu", "cpu")
    finally:
        torch.set_num_threads(before)
    for expected, result in zip(want, got):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


BAD = [
    ({"x": torch.zeros(2, 0, 3)}, "axis l is empty"),
    ({"x": torch.zeros(0, 4, 3)}, "axis b is empty"),
    ({"x": torch.zeros(2, 4)}, "x has shape"),
    ({"x": torch.zeros(2, 4, 3, dtype=torch.int32)}, "x has dtype"),
    ({"weight": torch.zeros(2, 4)}, "weight has shape"),
    ({"weight": torch.zeros(3, 0)}, "axis k is empty"),
    ({"weight": torch.zeros(3, 4, dtype=torch.float64)}, "weight is float64"),
    ({"bias": torch.zeros(2)}, "bias has shape"),
    ({"bias": torch.zeros(3, device="meta")}, "bias is on meta"),
    ({"initial_state": torch.zeros(2, 4, 3)}, "initial_state has shape"),
    ({"activation": "relu"}, "activation is 'relu'"),
    ({"backend": "fast"}, "backend is 'fast'"),
    ({"backend": "gpu"}, "needs tensors on cuda"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_input(change, message):
    good = {"x": torch.zeros(2, 4, 3), "weight": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(good | change))
