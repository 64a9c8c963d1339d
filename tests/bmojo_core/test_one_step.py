"""Claims about decoding's single position: what "auto" does there is the reference, gradients too.

Every optional argument is drawn present or absent, in every dtype.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmojo_core.ops import causal_conv1d, innovation, selective_scan

OPTIONAL = st.lists(st.booleans(), min_size=4, max_size=4)
SIZES = {"b": st.integers(1, 3), "d": st.integers(1, 9), "k": st.integers(1, 5)}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from(list(TOLERANCE))


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def compare(op: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor]) -> None:
    """Outputs and gradients of "auto" and of the float64 reference on the same numbers."""
    results = []
    for backend, wide in (("auto", False), ("reference", True)):
        leaves = {
            name: (x.double() if wide else x).detach().clone().requires_grad_()
            for name, x in inputs.items()
        }
        outputs = op(backend=backend, **leaves)
        loss = sum((x.double() * (i + 1 + x.double())).sum() for i, x in enumerate(outputs))
        # without a state before it, one step does not read A
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        results.append((*outputs, *gradients))
    dtype = next(iter(inputs.values())).dtype
    for got, want in zip(*results, strict=True):
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * scale)


@settings(max_examples=40, deadline=None)
@given(**SIZES, dtype=DTYPES, present=OPTIONAL, softplus=st.booleans())
def test_scan(b, d, k, dtype, present, softplus):
    shapes = {"u": (b, 1, d), "delta": (b, 1, d), "A": (d, k), "B": (b, 1, k), "C": (b, 1, k)}
    optional = {"D": (d,), "z": (b, 1, d), "delta_bias": (d,), "initial_state": (b, d, k)}
    chosen = (pair for pair, there in zip(optional.items(), present, strict=True) if there)
    inputs = draw(shapes | dict(chosen), dtype)
    inputs["A"] = -inputs["A"].abs()

    def op(**arguments) -> tuple[Tensor, Tensor]:
        return selective_scan(delta_softplus=softplus, return_last_state=True, **arguments)

    compare(op, inputs)


@settings(max_examples=40, deadline=None)
@given(**SIZES, dtype=DTYPES, present=OPTIONAL, activation=st.sampled_from([None, "silu"]))
def test_convolution(b, d, k, dtype, present, activation):
    optional = {"bias": (d,), "initial_state": (b, k - 1, d)}
    chosen = (pair for pair, there in zip(optional.items(), present, strict=False) if there)
    inputs = draw({"x": (b, 1, d), "weight": (d, k)} | dict(chosen), dtype)
    compare(lambda **arguments: (causal_conv1d(activation=activation, **arguments),), inputs)


@settings(max_examples=40, deadline=None)
@given(**SIZES, dtype=DTYPES, present=OPTIONAL)
def test_innovation(b, d, k, dtype, present):
    optional = {"weights": (k,), "past": (b, k, d)}
    chosen = (pair for pair, there in zip(optional.items(), present, strict=False) if there)
    inputs = draw({"y": (b, 1, d)} | dict(chosen), dtype)
    compare(lambda **arguments: (innovation(taps=k, **arguments),), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_size_zero_leaves_the_state_exactly(dtype):
    inputs = draw({"u": (2, 1, 4), "A": (4, 3), "B": (2, 1, 3), "C": (2, 1, 3)}, dtype)
    state = draw({"x": (2, 4, 3)}, torch.float32)["x"]
    delta = torch.zeros(2, 1, 4, dtype=dtype)
    _, after = selective_scan(delta=delta, initial_state=state, return_last_state=True, **inputs)
    assert torch.equal(after, state)
