"""Innovation: the squared error of a running average of the previous outputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmojo_core.ops.innovation import innovation

LENGTHS = (1, 31, 32, 63, 500)


def random_case(b, l, d, taps, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(b, l, d, generator=g, dtype=dtype)
    weights = torch.randn(taps, generator=g, dtype=dtype)
    past = torch.randn(b, taps, d, generator=g, dtype=dtype)
    return y, weights, past


def test_by_hand():
    y = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [5.0, 4.0]]], dtype=torch.float64)
    # averages of the two previous outputs: (0,0), (.5,0), (2,1)
    expected = torch.tensor([[0.5, (2.5**2 + 2**2) / 2, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(innovation(y, taps=2), expected)


def test_past_is_oldest_first():
    y = torch.zeros(1, 1, 1, dtype=torch.float64)
    past = torch.tensor([[[5.0], [7.0]]], dtype=torch.float64)
    newest_only = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert innovation(y, 2, newest_only, past).item() == 49.0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_constant_sequence_surprises_only_while_the_average_fills(backend):
    e = innovation(torch.ones(2, 10, 3), taps=4, backend=backend)
    ramp = torch.tensor([(1 - j / 4) ** 2 for j in range(4)] + [0.0] * 6)
    torch.testing.assert_close(e, ramp.expand(2, 10))


@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("with_past", [False, True])
def test_fast_path_equals_reference_with_all_gradients(l, with_past):
    y, weights, past = random_case(2, l, 5, 4)
    upstream = torch.randn(2, l, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for backend in ("reference", "cpu"):
        leaves = [x.clone().requires_grad_() for x in (y, weights, past)][: 3 if with_past else 2]
        e = innovation(leaves[0], 4, *leaves[1:], backend=backend)
        results.append([e, *torch.autograd.grad(e, leaves, upstream)])
    for expected, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, expected, rtol=1e-12, atol=1e-12)


def test_gradient_of_y_alone():
    y, weights, _ = random_case(1, 9, 3, 4)
    y.requires_grad_()
    grads = [
        torch.autograd.grad(innovation(y, 4, weights, backend=backend).sum(), y)[0]
        for backend in ("reference", "cpu")
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    leaves = [x.requires_grad_() for x in random_case(2, 7, 3, 3)]
    assert torch.autograd.gradcheck(
        lambda y, w, past: innovation(y, 3, w, past, backend=backend), leaves
    )


def test_second_derivatives_are_right_or_refused():
    """float64 takes the plain equation; the shifted sums differentiate once."""
    leaves = [x.requires_grad_() for x in random_case(2, 7, 3, 3)]
    assert torch.autograd.gradgradcheck(lambda y, w, past: innovation(y, 3, w, past), leaves)
    y = leaves[0].detach().float().requires_grad_()
    (first,) = torch.autograd.grad(innovation(y, 3).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


@given(
    b=st.integers(1, 3),
    l=st.integers(2, 40),
    d=st.integers(1, 5),
    taps=st.integers(1, 9),
    data=st.data(),
)
def test_split_and_carry_changes_nothing(b, l, d, taps, data):
    y, weights, past = random_case(b, l, d, taps)
    cut = data.draw(st.integers(1, l - 1))
    whole = innovation(y, taps, weights, past)
    first = innovation(y[:, :cut], taps, weights, past)
    carried = torch.cat([past, y[:, :cut]], dim=1)[:, -taps:]
    second = innovation(y[:, cut:], taps, weights, carried)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(whole, innovation(y, taps, weights, past, backend="reference"))


@given(l=st.integers(2, 30), taps=st.integers(1, 6), data=st.data())
def test_causal_and_finite_memory(l, taps, data):
    """Changing output t changes the innovations t .. t + taps and no other."""
    y, weights, past = random_case(1, l, 3, taps)
    t = data.draw(st.integers(0, l - 1))
    changed = y.clone()
    changed[:, t] += 1.0
    moved = innovation(y, taps, weights, past) != innovation(changed, taps, weights, past)
    expected = [t <= i <= t + taps for i in range(l)]
    assert moved[0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_half_precision_accumulates_and_returns_float32(dtype, backend):
    y = random_case(2, 50, 64, 4, dtype=torch.float32)[0].to(dtype)
    e = innovation(y, backend=backend)
    assert e.dtype == torch.float32
    torch.testing.assert_close(e.double(), innovation(y.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"y": torch.randn(2, 3)}, "y"),
        ({"y": torch.randn(0, 3, 4)}, "y"),
        ({"y": torch.randn(2, 0, 4)}, "y"),
        ({"y": torch.ones(2, 3, 4, dtype=torch.int64)}, "y"),
        ({"taps": 0}, "taps"),
        ({"taps": 2.0}, "taps"),
        ({"weights": torch.randn(3)}, "weights"),
        ({"past": torch.randn(2, 3, 4)}, "past"),
        ({"past": torch.randn(2, 4, 4, dtype=torch.float64)}, "past"),
        ({"backend": "numpy"}, "backend"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_input_names_the_argument(change, names):
    with pytest.raises(ValueError, match=names):
        innovation(**{"y": torch.randn(2, 3, 4), "taps": 4, **change})
