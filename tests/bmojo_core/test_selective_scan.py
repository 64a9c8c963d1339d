"""Claims about the selective scan: every fast path equals the equation, outputs and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from torch import Tensor

from bmojo_core.ops import selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def make_inputs(b: int, l: int, d: int, n: int, seed: int = 0) -> dict[str, Tensor]:
    """Float64 arguments of a scan whose states neither vanish nor explode."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "u": randn(b, l, d),
        "delta": randn(b, l, d),
        "A": -torch.rand(d, n, generator=g, dtype=torch.float64) * 4,
        "B": randn(b, l, n),
        "C": randn(b, l, n),
        "D": randn(d),
        "z": randn(b, l, d),
        "delta_bias": randn(d) - 1,
        "initial_state": randn(b, d, n),
    }


def outputs_and_gradients(
    inputs: dict[str, Tensor], backend: str, delta_softplus: bool = True
) -> dict[str, Tensor]:
    """y, last_state, and the gradient by every argument of a random linear functional of both."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y, last = selective_scan(
        **leaves, delta_softplus=delta_softplus, return_last_state=True, backend=backend
    )
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


SIZES = [(1, 1, 1), (31, 5, 4), (32, 17, 16), (63, 40, 17), (500, 17, 4), (33, 16, 1), (64, 32, 16)]


@pytest.mark.parametrize("l, d, n", SIZES)
def test_cpu_equals_reference(l, d, n):
    inputs = make_inputs(2, l, d, n)
    want = outputs_and_gradients(inputs, "reference")
    assert_close(outputs_and_gradients(inputs, "cpu"), want, 1e-13)


@pytest.mark.parametrize("l, d, n", SIZES)
def test_cpu_in_float32(l, d, n):
    """Against float64 on the same values: within 3e-6, or, where a sum cancels, within three
    times what the equation itself loses in float32."""
    inputs = cast(make_inputs(2, l, d, n), torch.float32)
    want = outputs_and_gradients(cast(inputs, torch.float64), "reference")
    got = outputs_and_gradients(inputs, "cpu")
    plain = outputs_and_gradients(inputs, "reference")
    for name, expected in want.items():
        scale = expected.abs().max()
        error = (got[name].double() - expected).abs().max() / scale
        allowed = max(3e-6, 3 * ((plain[name].double() - expected).abs().max() / scale).item())
        assert error <= allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("absent", [{"D"}, {"z"}, {"initial_state", "delta_bias"}, set(NAMES[5:])])
def test_optional_arguments(absent):
    inputs = {k: v for k, v in make_inputs(3, 40, 20, 3).items() if k not in absent}
    want = outputs_and_gradients(inputs, "reference")
    assert_close(outputs_and_gradients(inputs, "cpu"), want, 1e-13)


@pytest.mark.parametrize("threads, b", [(1, 5), (2, 1), (3, 2), (2, 9)])
def test_any_number_of_threads(threads, b):
    """Work large enough to be split: over sequences, or over channels of too few sequences."""
    inputs = make_inputs(b, 70, 80, 16)
    want = outputs_and_gradients(inputs, "reference")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = outputs_and_gradients(inputs, "cpu")
    finally:
        torch.set_num_threads(before)
    assert_close(got, want, 1e-13)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("delta_softplus", [False, True])
def test_gradcheck(backend, delta_softplus):
    """Numerical derivatives in float64, by all nine arguments, through y and last_state."""
    leaves = [t.requires_grad_() for t in make_inputs(2, 5, 3, 2).values()]

    def scan(u, delta, A, B, C, D, z, delta_bias, initial_state):
        step = delta if delta_softplus else delta.abs() + 0.1
        arguments = (u, step, A, B, C, D, z, delta_bias.abs())
        return selective_scan(*arguments, delta_softplus, initial_state, True, backend=backend)

    assert torch.autograd.gradcheck(scan, leaves)


def test_last_state_alone_has_gradients():
    """The state at the end of a prefix is trained through when only it is used."""
    inputs = cast(make_inputs(2, 40, 6, 3), torch.float32)
    gradients = []
    for backend in ("reference", "cpu"):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if k not in ("z", "C")}
        _, last = selective_scan(
            C=inputs["C"], **leaves, delta_softplus=True, return_last_state=True, backend=backend
        )
        wanted = [leaves[k] for k in ("u", "delta", "A", "B", "initial_state")]
        gradients.append(torch.autograd.grad(last.square().sum(), wanted))
    for want, got in zip(*gradients):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_constant_coefficients_are_a_filter(backend):
    """With constant delta, B and C each channel is a sum of one-pole filters: scipy's lfilter."""
    rng = np.random.default_rng(0)
    l, d, n = 200, 3, 4
    u = rng.standard_normal((1, l, d))
    A, B, C = -rng.random((d, n)) * 3, rng.standard_normal(n), rng.standard_normal(n)
    delta = rng.random(d) * 0.5
    want = np.zeros((l, d))
    for c in range(d):
        for k in range(n):
            pole = np.exp(delta[c] * A[c, k])
            want[:, c] += C[k] * lfilter([delta[c] * B[k]], [1.0, -pole], u[0, :, c])
    tensors = (u, np.tile(delta, (1, l, 1)), A, np.tile(B, (1, l, 1)), np.tile(C, (1, l, 1)))
    y = selective_scan(*map(torch.from_numpy, tensors), backend=backend)
    np.testing.assert_allclose(y[0].numpy(), want, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(l=st.integers(2, 90), cut=st.floats(0, 1), d=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_two_pieces_equal_one(l, cut, d, seed):
    """Any split with the state carried over gives the same outputs and last state."""
    inputs = cast(make_inputs(2, l, d, 3, seed), torch.float32)
    m = min(l - 1, 1 + int(cut * l))
    whole, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    first = {k: v[:, :m] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    second = {k: v[:, m:] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    y1, state = selective_scan(**first, delta_softplus=True, return_last_state=True)
    second["initial_state"] = state
    y2, end = selective_scan(**second, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("l", [1, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_step_holds_the_state_bit_for_bit(backend, l, dtype):
    inputs = cast(make_inputs(3, l, 21, 5), dtype)
    inputs["delta"].zero_()
    inputs["delta_bias"].zero_()
    _, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    assert torch.equal(last, inputs["initial_state"])


@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_accumulates_in_float32(dtype, eps):
    """Only the output is rounded: within one unit of rounding of the scan of the same values."""
    inputs = cast(make_inputs(2, 300, 17, 4), dtype)
    widened = cast(inputs, torch.float64)
    y, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    want, want_last = selective_scan(**widened, delta_softplus=True, return_last_state=True)
    assert y.dtype == dtype and last.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=eps, atol=1e-4)
    torch.testing.assert_close(last.double(), want_last, rtol=1e-5, atol=1e-5)


def test_half_precision_gradients():
    inputs = cast(make_inputs(2, 65, 17, 4), torch.bfloat16)
    want = outputs_and_gradients(cast(inputs, torch.float64), "reference")
    got = outputs_and_gradients(inputs, "cpu")
    assert got["du"].dtype == torch.bfloat16
    assert_close(got, want, 2**-7)


def test_non_contiguous_inputs():
    """Transposed, strided and broadcast views give what their copies give."""
    inputs = make_inputs(2, 33, 18, 4)
    want = outputs_and_gradients(inputs, "reference")
    views = dict(inputs)
    views["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    views["z"] = torch.cat([inputs["z"], inputs["z"]], -1).chunk(2, -1)[1]
    views["A"] = inputs["A"].T.contiguous().T
    views["B"] = torch.stack([inputs["B"], inputs["B"]], -1)[..., 0]
    leaves = {k: v.requires_grad_() for k, v in views.items()}
    y, last = selective_scan(**leaves, delta_softplus=True, return_last_state=True, backend="cpu")
    assert not leaves["u"].is_contiguous() and not leaves["B"].is_contiguous()
    assert_close(
        {"y": y.detach(), "last_state": last.detach()},
        {k: want[k] for k in ("y", "last_state")},
        1e-13,
    )
    broadcast_gradient = torch.autograd.grad(y.sum(), leaves["u"])[0]  # an expanded dy
    plain = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y_plain = selective_scan(**plain, delta_softplus=True, backend="reference")
    torch.testing.assert_close(
        broadcast_gradient,
        torch.autograd.grad(y_plain.sum(), plain["u"])[0],
        rtol=1e-10,
        atol=1e-10,
    )


def test_nan_stays_in_its_sequence_and_reaches_all_later_outputs():
    inputs = cast(make_inputs(2, 40, 17, 3), torch.float32)
    inputs["u"][0, 11, 2] = float("nan")
    y = selective_scan(**inputs, delta_softplus=True, backend="cpu")
    bad = torch.isnan(y)
    assert bad[0, 11:, 2].all() and bad.sum() == 40 - 11


@pytest.mark.parametrize("extreme", [-1e4, -200.0, -126.7, 0.0, 60.0])
def test_extreme_decays(extreme):
    """Decays that underflow give 0 and those that are large stay right."""
    shape = (1, 1, 16)
    A, x0 = torch.full((16, 1), extreme), torch.ones(1, 16, 1)
    zero, one = torch.zeros(1, 1, 1), torch.ones(shape)
    _, last = selective_scan(one, one, A, zero, zero, None, None, None, False, x0, True, "cpu")
    want = np.exp(np.float64(extreme))
    np.testing.assert_allclose(last.numpy(), want, rtol=1e-6 * max(1, abs(extreme)), atol=1.2e-38)


def test_decode_step_without_gradients_equals_the_scan():
    inputs = cast(make_inputs(3, 20, 18, 4), torch.float32)
    want = selective_scan(**inputs, delta_softplus=True)
    state = inputs["initial_state"]
    for t in range(20):
        now = {k: inputs[k][:, t : t + 1] for k in ("u", "delta", "B", "C", "z")}
        fixed = {k: inputs[k] for k in ("A", "D", "delta_bias")}
        with torch.no_grad():
            y, state = selective_scan(
                **now, **fixed, delta_softplus=True, initial_state=state, return_last_state=True
            )
        torch.testing.assert_close(y[:, 0], want[:, t], rtol=1e-5, atol=1e-5)


BAD = [
    ({"u": torch.zeros(2, 0, 3)}, "axis l is empty"),
    ({"u": torch.zeros(0, 4, 3)}, "axis b is empty"),
    ({"u": torch.zeros(4, 3)}, "u has shape"),
    ({"delta": torch.zeros(2, 5, 3)}, "delta has shape"),
    ({"A": torch.zeros(4, 2)}, "A has shape"),
    ({"B": torch.zeros(2, 4, 3)}, "B has shape"),
    ({"C": torch.zeros(2, 4)}, "C has shape"),
    ({"D": torch.zeros(1)}, "D has shape"),
    ({"z": torch.zeros(2, 4, 1)}, "z has shape"),
    ({"delta_bias": torch.zeros(3, 1)}, "delta_bias has shape"),
    ({"initial_state": torch.zeros(2, 2, 3)}, "initial_state has shape"),
    ({"u": torch.zeros(2, 4, 3, dtype=torch.int64)}, "u has dtype"),
    ({"z": torch.zeros(2, 4, 3, dtype=torch.complex64)}, "z has dtype"),
    ({"B": torch.zeros(2, 4, 2, dtype=torch.float64)}, "B is float64"),
    ({"D": torch.zeros(3, device="meta")}, "D is on meta"),
    ({"u": [1.0]}, "u is a list"),
    ({"backend": "fast"}, "backend is 'fast'"),
    ({"backend": "gpu"}, "needs tensors on cuda"),
    ({"backend": "mamba_ssm"}, "needs tensors on cuda"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_input(change, message):
    b, l, d, n = 2, 4, 3, 2
    good = {
        "u": torch.zeros(b, l, d),
        "delta": torch.zeros(b, l, d),
        "A": torch.zeros(d, n),
        "B": torch.zeros(b, l, n),
        "C": torch.zeros(b, l, n),
    }
    with pytest.raises(ValueError, match=message):
        selective_scan(**(good | change))


def test_rows_too_far_apart_for_the_gpu_kernels_are_brought_together():
    """They count the elements of a chunk in 32 bits; a view of a wider tensor may be wider yet."""
    from bmojo_core.ops.selective_scan.gpu import _rows

    near, far = (torch.empty_strided((1, 2, 4), (0, s, 1), device="meta") for s in (2**20, 2**27))
    assert _rows(near) is near and _rows(far).is_contiguous()
