"""Claims about the scalar scan: every fast path equals the equation, outputs and gradients."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmojo_core.ops import scalar_scan, selective_scan
from bmojo_core.ops.scalar_scan.cpu import segment_sums

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
TIMED = ("u", "delta", "B", "C", "z")
SUPPORT = Path(__file__).parents[1] / "support"


def make_inputs(b: int, l: int, h: int, p: int, n: int, seed: int = 0) -> dict[str, Tensor]:
    """Float64 arguments of a scan whose states neither vanish nor explode."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    d = h * p
    return {
        "u": randn(b, l, d),
        "delta": randn(b, l, h),
        "A": -torch.rand(h, generator=g, dtype=torch.float64) * 4,
        "B": randn(b, l, n),
        "C": randn(b, l, n),
        "D": randn(d),
        "z": randn(b, l, d),
        "delta_bias": randn(h) - 1,
        "initial_state": randn(b, d, n),
    }


def outputs_and_gradients(inputs: dict[str, Tensor], scan, **options) -> dict[str, Tensor]:
    """y, last_state, and the gradient by every argument of a random linear functional of both."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y, last = scan(**leaves, **{"delta_softplus": True} | options, return_last_state=True)
    g = torch.Generator().manual_seed(7)
    weight_y = torch.randn(y.shape, generator=g, dtype=torch.float64)
    weight_last = torch.randn(last.shape, generator=g, dtype=torch.float64)
    loss = (y.double() * weight_y).sum() + (last.double() * weight_last).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    results = {"y": y.detach(), "last_state": last.detach()}
    return results | {f"d{name}": grad for name, grad in zip(leaves, gradients)}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Each within `tolerance` of the largest magnitude of what is wanted."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        error = (got[name].double() - expected.double()).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


SIZES = [
    (1, 1, 1, 1), (31, 5, 3, 4), (32, 4, 8, 16), (63, 3, 5, 17), (500, 2, 7, 4), (64, 1, 16, 1),
    (65, 6, 1, 5),
]  # fmt: skip


@pytest.mark.parametrize("l, h, p, n", SIZES)
def test_chunks_equal_reference(l, h, p, n):
    inputs = make_inputs(2, l, h, p, n)
    want = outputs_and_gradients(inputs, scalar_scan, backend="reference")
    assert_close(outputs_and_gradients(inputs, scalar_scan, backend="cpu"), want, 1e-13)


@pytest.mark.parametrize("l, h, p, n", SIZES)
def test_chunks_in_float32(l, h, p, n):
    """Against float64 on the same values: within 3e-6, or, where a sum cancels, within three
    times what the equation itself loses in float32."""
    inputs = cast(make_inputs(2, l, h, p, n), torch.float32)
    want = outputs_and_gradients(cast(inputs, torch.float64), scalar_scan, backend="reference")
    got = outputs_and_gradients(inputs, scalar_scan)
    plain = outputs_and_gradients(inputs, scalar_scan, backend="reference")
    for name, expected in want.items():
        scale = expected.abs().max()
        error = (got[name].double() - expected).abs().max() / scale
        allowed = max(3e-6, 3 * ((plain[name].double() - expected).abs().max() / scale).item())
        assert error <= allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("l, h, p, n", SIZES)
def test_it_is_the_selective_scan_of_heads_that_fade_alike(backend, l, h, p, n):
    """Delta and A repeated over the channels and states of a head, by the other operation."""
    inputs = make_inputs(2, l, h, p, n)

    def repeated(delta, A, delta_bias, **others):
        wide = dict(
            delta=delta.repeat_interleave(p, -1), A=A.repeat_interleave(p)[:, None].expand(-1, n),
            delta_bias=delta_bias.repeat_interleave(p),
        )  # fmt: skip
        return selective_scan(**wide, **others, backend="reference")

    want = outputs_and_gradients(inputs, repeated)
    assert_close(outputs_and_gradients(inputs, scalar_scan, backend=backend), want, 1e-12)


def test_it_is_a_masked_attention_without_a_softmax():
    """The dual form over the whole sequence: y = (L * C B^T) (delta u), L a product of decays."""
    inputs = make_inputs(1, 20, 2, 3, 4)
    u, delta, A, B, C = (inputs[name] for name in ("u", "delta", "A", "B", "C"))
    decay = np.exp(np.asarray(delta.abs()[0] * A))  # (l, h)
    L = np.zeros((2, 20, 20))
    for i in range(20):
        for j in range(i + 1):
            L[:, i, j] = np.prod(decay[j + 1 : i + 1], axis=0)
    pairs = np.einsum("hij,in,jn->hij", L, C[0].numpy(), B[0].numpy())
    drive = (delta.abs()[0, :, :, None] * u[0].view(20, 2, 3)).numpy()
    want = np.einsum("hij,jhp->ihp", pairs, drive).reshape(20, 6)
    y = scalar_scan(u, delta.abs(), A, B, C, backend="cpu")
    np.testing.assert_allclose(y[0].numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("absent", [{"D"}, {"z"}, {"initial_state", "delta_bias"}, set(NAMES[5:])])
def test_optional_arguments(absent):
    inputs = {k: v for k, v in make_inputs(3, 70, 4, 5, 3).items() if k not in absent}
    want = outputs_and_gradients(inputs, scalar_scan, backend="reference")
    assert_close(outputs_and_gradients(inputs, scalar_scan, backend="cpu"), want, 1e-13)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("delta_softplus", [False, True])
def test_gradcheck(backend, delta_softplus):
    """Numerical derivatives in float64, by all nine arguments, through y and last_state."""
    leaves = [t.requires_grad_() for t in make_inputs(2, 5, 2, 2, 2).values()]

    def scan(u, delta, A, B, C, D, z, delta_bias, initial_state):
        step = delta if delta_softplus else delta.abs() + 0.1
        arguments = (u, step, A, B, C, D, z, delta_bias.abs())
        return scalar_scan(*arguments, delta_softplus, initial_state, True, backend=backend)

    assert torch.autograd.gradcheck(scan, leaves)


@settings(max_examples=40)
@given(st.integers(2, 150), st.floats(0, 1), st.integers(1, 3), st.integers(1, 5),
       st.integers(0, 99))  # fmt: skip
def test_two_halves_equal_one(l, cut, h, p, seed):
    """Any split with the state carried over gives the same outputs and last state."""
    inputs = cast(make_inputs(2, l, h, p, 3, seed), torch.float32)
    m = min(l - 1, 1 + int(cut * l))
    whole, last = scalar_scan(**inputs, delta_softplus=True, return_last_state=True)
    first = {k: v[:, :m] if k in TIMED else v for k, v in inputs.items()}
    second = {k: v[:, m:] if k in TIMED else v for k, v in inputs.items()}
    y1, state = scalar_scan(**first, delta_softplus=True, return_last_state=True)
    second["initial_state"] = state
    y2, end = scalar_scan(**second, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("l", [1, 50, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_step_holds_the_state_bit_for_bit(backend, l, dtype):
    inputs = cast(make_inputs(3, l, 3, 7, 5), dtype)
    inputs["delta"].zero_()
    inputs["delta_bias"].zero_()
    _, last = scalar_scan(**inputs, return_last_state=True, backend=backend)
    assert torch.equal(last, inputs["initial_state"])


@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_accumulates_in_float32(dtype, eps):
    """Only the output is rounded: within one unit of rounding of the scan of the same values."""
    inputs = cast(make_inputs(2, 300, 3, 6, 4), dtype)
    widened = cast(inputs, torch.float64)
    y, last = scalar_scan(**inputs, delta_softplus=True, return_last_state=True)
    want, want_last = scalar_scan(**widened, delta_softplus=True, return_last_state=True)
    assert y.dtype == dtype and last.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=eps, atol=1e-4)
    torch.testing.assert_close(last.double(), want_last, rtol=1e-5, atol=1e-5)


def test_long_forgetting_loses_no_digits():
    """Log-decays that add up to thousands: what is left is what lies near, and is right."""
    inputs = cast(make_inputs(1, 128, 2, 3, 4), torch.float32)
    inputs["delta"] = inputs["delta"].abs() * 20
    inputs["delta"][:, 1::2] *= 1e-4  # every other position forgets almost nothing
    inputs["A"] -= 3
    inputs["delta_bias"].zero_()
    got = scalar_scan(**inputs, backend="cpu")
    want = scalar_scan(**cast(inputs, torch.float64))
    assert (got.double() - want).abs().max() <= 1e-6 * want.abs().max()


def test_segment_sums():
    a = torch.randn(3, 7, dtype=torch.float64)
    s = segment_sums(a)
    for i in range(7):
        for j in range(7):
            want = a[:, j + 1 : i + 1].sum(-1) if j <= i else torch.full((3,), -torch.inf)
            torch.testing.assert_close(s[:, i, j], want.double())


def test_non_contiguous_inputs():
    inputs = make_inputs(2, 70, 3, 6, 4)
    want = outputs_and_gradients(inputs, scalar_scan, backend="reference")
    views = dict(inputs)
    views["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    views["z"] = torch.cat([inputs["z"], inputs["z"]], -1).chunk(2, -1)[1]
    views["B"] = torch.stack([inputs["B"], inputs["B"]], -1)[..., 0]
    y, last = scalar_scan(**views, delta_softplus=True, return_last_state=True, backend="cpu")
    torch.testing.assert_close(y, want["y"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, want["last_state"], rtol=1e-12, atol=1e-12)


def test_later_inputs_change_nothing_before_them():
    inputs = cast(make_inputs(1, 100, 2, 4, 3), torch.float32)
    other = {k: v.clone() for k, v in inputs.items()}
    for name in TIMED:
        other[name][:, 40:] += 1
    first, second = (scalar_scan(**x, delta_softplus=True, backend="cpu") for x in (inputs, other))
    assert torch.equal(first[:, :40], second[:, :40])
    assert not torch.equal(first[:, 40:], second[:, 40:])


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5),
       st.lists(st.booleans(), min_size=4, max_size=4), st.booleans(),
       st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
def test_one_position_is_the_reference(b, h, p, n, present, softplus, dtype):
    """What "auto" does for a decoded token, with every optional argument there or not."""
    there = dict(zip(NAMES[5:], present, strict=True))
    inputs = {k: v.to(dtype) for k, v in make_inputs(b, 1, h, p, n).items() if there.get(k, True)}
    got = scalar_scan(**inputs, delta_softplus=softplus, return_last_state=True)
    wide = cast(inputs, torch.float64)
    want = scalar_scan(**wide, delta_softplus=softplus, return_last_state=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, want, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale)


def test_kernels_interpreted():
    """The GPU's kernels, run by triton's interpreter in a fresh process (no GPU, small sizes)."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, whose interpreter runs kernels without a GPU")
    done = subprocess.run(
        [sys.executable, SUPPORT / "interpreted_scan.py"], capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "kernels equal the reference", done.stderr[-3000:]


BAD = [
    ({"u": torch.zeros(2, 0, 6)}, "axis l is empty"),
    ({"u": torch.zeros(4, 6)}, "u has shape"),
    ({"delta": torch.zeros(2, 5, 3)}, "delta has shape"),
    ({"A": torch.zeros(4)}, r"A has shape \(4,\); expected \(h,\) with h a divisor of d=6"),
    ({"A": torch.zeros(3, 2)}, "A has shape"),
    ({"B": torch.zeros(2, 5, 2)}, "B has shape"),
    ({"C": torch.zeros(2, 4, 3)}, "C has shape"),
    ({"D": torch.zeros(3)}, "D has shape"),
    ({"z": torch.zeros(2, 4, 1)}, "z has shape"),
    ({"delta_bias": torch.zeros(6)}, "delta_bias has shape"),
    ({"initial_state": torch.zeros(2, 2, 3)}, "initial_state has shape"),
    ({"u": torch.zeros(2, 4, 6, dtype=torch.int64)}, "u has dtype"),
    ({"B": torch.zeros(2, 4, 2, dtype=torch.float64)}, "B is float64"),
    ({"D": torch.zeros(6, device="meta")}, "D is on meta"),
    ({"backend": "mamba_ssm"}, "backend is 'mamba_ssm'"),
    ({"backend": "gpu"}, "needs tensors on cuda"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_input(change, message):
    b, l, h, d, n = 2, 4, 3, 6, 2
    good = {
        "u": torch.zeros(b, l, d),
        "delta": torch.zeros(b, l, h),
        "A": torch.zeros(h),
        "B": torch.zeros(b, l, n),
        "C": torch.zeros(b, l, n),
    }
    with pytest.raises(ValueError, match=message):
        scalar_scan(**(good | change))
