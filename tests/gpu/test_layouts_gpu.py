"""Every kernel reads its arguments wherever they lie: any strides, offsets past 2^31 elements.

Values and gradients are those of the float64 reference on the same numbers. What each layout is:

    expanded     one row shared by the whole batch (stride 0)
    transposed   batch and the next axis change places in memory
    reversed     all axes do, so that the last has no unit stride
    sliced       every other element of a wider tensor, which begins inside another
    shifted      whole, but not where a vector load could begin
"""

import pytest
import torch

from bmojo_core.ops import (
    causal_conv1d,
    innovation,
    memory_attention,
    running_top_k,
    scalar_scan,
    selective_scan,
)

B, L, D = 3, 70, 40


def expanded(x):
    return x[:1].expand(x.shape)


def transposed(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def reversed_(x):
    axes = tuple(range(x.ndim - 1, -1, -1))
    return x.permute(axes).contiguous().permute(axes)


def sliced(x):
    wide = torch.zeros([size + 1 for size in x.shape[:-1]] + [2 * x.shape[-1] + 1],
                       dtype=x.dtype, device=x.device)  # fmt: skip
    inside = wide[(slice(1, None),) * (x.ndim - 1) + (slice(1, None, 2),)]
    return inside.copy_(x)


def shifted(x):
    return x.new_empty(x.numel() + 3)[3:].view(x.shape).copy_(x)


LAYOUTS = (expanded, transposed, reversed_, sliced, shifted)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.strip("_"))
dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))


def laid(layout, tensors):
    """Every tensor with at least two axes in another layout."""
    return {n: x if x.ndim < 2 else layout(x) for n, x in tensors.items()}


def attention_problem(draw, dtype, b=B, l=L, r=5, h=4, g=2, p=16, chunk=24, m=6):
    k, v = (draw(b, r + l, g, p, dtype=dtype) for _ in "kv")
    mem_k, mem_v = (draw(b, -(-l // chunk), m, g, p, dtype=dtype) for _ in "kv")
    return dict(q=draw(b, l, h, p, dtype=dtype), k=k, v=v, mem_k=mem_k, mem_v=mem_v)


def attend(backend, **options):
    options = dict(window=20, chunk=24) | options
    return lambda **x: memory_attention(**x, **options, backend=backend)


@layouts
@pytest.mark.parametrize("which", ("mem_valid", "key_valid"))
def test_masks_of_the_memory_attention(draw, compare, poisoned, which, layout):
    inputs = attention_problem(draw, torch.float32)
    masks = dict(mem_valid=draw(B, 3, 6) > -0.3, key_valid=draw(B, L + 5) > -0.3)
    masks[which] = layout(masks[which])
    poisoned()
    compare(attend("gpu", **masks), attend("reference", **masks), inputs, torch.float32)


def test_a_mask_made_for_one_row_hides_the_same_in_all(draw):
    """One row's mask, expanded as the model does it, against the same mask written out."""
    inputs = attention_problem(draw, torch.bfloat16)
    for name, shape in (("mem_valid", (1, 3, 6)), ("key_valid", (1, L + 5))):
        one = draw(*shape) > 0
        shared = one.expand(B, *shape[1:])
        got = attend("gpu", **{name: shared})(**inputs)
        assert torch.equal(got, attend("gpu", **{name: shared.contiguous()})(**inputs))


@layouts
@dtypes
def test_memory_attention(draw, compare, poisoned, layout, dtype):
    inputs = laid(layout, attention_problem(draw, dtype))
    poisoned()
    compare(attend("gpu"), attend("reference"), inputs, dtype)


@layouts
@dtypes
def test_selective_scan(draw, compare, poisoned, layout, dtype):
    u, delta, z = (draw(B, L, D, dtype=dtype) for _ in range(3))
    inputs = dict(u=u, delta=delta, z=z, A=-draw(D, 16).abs(), D=draw(D), delta_bias=draw(D))
    inputs |= dict(B=draw(B, L, 16, dtype=dtype), C=draw(B, L, 16, dtype=dtype))
    inputs |= dict(initial_state=draw(B, D, 16))
    inputs = laid(layout, inputs)
    poisoned()

    def run(backend):
        options = dict(delta_softplus=True, return_last_state=True, backend=backend)
        return lambda **x: selective_scan(**x, **options)

    compare(run("gpu"), run("reference"), inputs, dtype)


@layouts
@dtypes
def test_scalar_scan(draw, compare, poisoned, layout, dtype):
    u, z = (draw(B, L, D, dtype=dtype) for _ in range(2))
    inputs = dict(u=u, delta=draw(B, L, 5, dtype=dtype) - 2, z=z, A=-draw(5).abs(), D=draw(D))
    inputs |= dict(B=draw(B, L, 16, dtype=dtype), C=draw(B, L, 16, dtype=dtype))
    inputs |= dict(initial_state=draw(B, D, 16))
    inputs = laid(layout, inputs)
    poisoned()

    def run(backend):
        options = dict(delta_softplus=True, return_last_state=True, backend=backend)
        return lambda **x: scalar_scan(**x, **options)

    compare(run("gpu"), run("reference"), inputs, dtype)


@layouts
@dtypes
def test_causal_conv(draw, compare, poisoned, layout, dtype):
    inputs = dict(x=draw(B, L, D, dtype=dtype), weight=draw(D, 4), bias=draw(D),
                  initial_state=draw(B, 3, D, dtype=dtype))  # fmt: skip
    inputs = laid(layout, inputs)
    poisoned()

    def run(backend):
        return lambda **x: causal_conv1d(**x, activation="silu", backend=backend)

    compare(run("gpu"), run("reference"), inputs, dtype)


@layouts
@dtypes
@pytest.mark.parametrize("past_dtype", (torch.float32, torch.bfloat16))
def test_innovation(draw, compare, poisoned, layout, dtype, past_dtype):
    inputs = dict(y=draw(B, L, D, dtype=dtype), weights=draw(4),
                  past=draw(B, 4, D, dtype=past_dtype))  # fmt: skip
    inputs = laid(layout, inputs)
    poisoned()

    def run(backend):
        return lambda **x: innovation(**x, taps=4, backend=backend)

    compare(run("gpu"), run("reference"), inputs, torch.bfloat16 if past_dtype != dtype else dtype)


@layouts
def test_running_top_k(draw, poisoned, layout):
    scores = layout(draw(B, L))
    poisoned()
    index, valid = running_top_k(scores, 7, 10, backend="gpu")
    want_index, want_valid = running_top_k(scores.cpu(), 7, 10, backend="reference")
    assert torch.equal(valid.cpu(), want_valid) and torch.equal(index.cpu(), want_index)


# -- offsets that do not fit in 32 bits -----------------------------------------------------------


def far_apart(x, axis):
    """The same numbers, neighbours along one axis so far apart that the last passes 2^31."""
    step = -(-(2**31) // (x.shape[axis] - 1) // 64) * 64 + 64
    strides, inner = [0] * x.ndim, 1
    for i in reversed([i for i in range(x.ndim) if i != axis]):
        strides[i], inner = inner, inner * x.shape[i]
    assert inner <= step
    strides[axis] = step
    room = torch.empty((x.shape[axis] - 1) * step + inner, dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("axis", (0, 1, 2))
@pytest.mark.parametrize("names", (("q",), ("k",), ("v",), ("mem_k", "mem_v")), ids="-".join)
def test_far_rows_of_the_memory_attention(draw, compare, names, axis):
    inputs = attention_problem(draw, torch.bfloat16, b=2)
    inputs |= {name: far_apart(inputs[name], axis) for name in names}
    compare(attend("gpu"), attend("reference"), inputs, torch.bfloat16)


@pytest.mark.parametrize("axis", (0, 1))
def test_far_rows_of_the_rest(draw, compare, axis):
    dtype = torch.bfloat16
    y = far_apart(draw(2, L, D, dtype=dtype), axis)
    compare(
        lambda y: innovation(y, 4, backend="gpu"),
        lambda y: innovation(y, 4, backend="reference"), dict(y=y), dtype,
    )  # fmt: skip
    weight = draw(D, 4)
    compare(
        lambda x: causal_conv1d(x, weight, backend="gpu"),
        lambda x: causal_conv1d(x, weight.double(), backend="reference"), dict(x=y), dtype,
    )  # fmt: skip
    rest = dict(delta=draw(2, L, D, dtype=dtype), A=-draw(D, 16).abs(),
                B=draw(2, L, 16, dtype=dtype), C=draw(2, L, 16, dtype=dtype))  # fmt: skip
    compare(
        lambda **x: selective_scan(**x, delta_softplus=True, backend="gpu"),
        lambda **x: selective_scan(**x, delta_softplus=True, backend="reference"),
        dict(u=y, **rest), dtype,
    )  # fmt: skip


def test_more_than_2_to_the_31_elements(draw):
    """The last steps of a sequence whose inputs and outputs each hold more than 2^31 numbers."""
    if torch.cuda.mem_get_info()[0] < 50 * 2**30:
        pytest.skip("needs 50 GiB of free memory on the device")
    dtype, tail, d = torch.bfloat16, 40, 2056
    l = 2**31 // d + tail
    x = torch.zeros(1, l, d, dtype=dtype, device="cuda")
    x[:, -3 * tail :] = draw(1, 3 * tail, d, dtype=dtype)
    end = x[:, -3 * tail :].clone()
    weight = draw(d, 4)
    y = causal_conv1d(x, weight, backend="gpu")[:, -tail:].clone()
    assert torch.equal(y, causal_conv1d(end, weight, backend="gpu")[:, -tail:])
    error = innovation(x, 4, backend="gpu")[:, -tail:]
    assert torch.equal(error, innovation(end, 4, backend="gpu")[:, -tail:])
    A, B, C = -draw(d, 16).abs(), draw(1, l, 16, dtype=dtype), draw(1, l, 16, dtype=dtype)
    weights = draw(1, tail, d)

    def gradients(u, B, C):
        u = u.detach().requires_grad_()
        y = selective_scan(u, u, A, B, C, delta_softplus=True, backend="gpu")
        loss = (y[:, -tail:].float() * weights).sum()
        return y[:, -tail:].detach().clone(), torch.autograd.grad(loss, u)[0][:, -tail:].clone()

    # before the last 3 tail steps u is 0: the state that they start from is 0, too
    got = gradients(x, B, C)
    want = gradients(end, B[:, -3 * tail :], C[:, -3 * tail :])
    for a, b in zip(got, want, strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()
