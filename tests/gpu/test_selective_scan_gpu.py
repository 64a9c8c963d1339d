"""Selective scan kernels against the float64 reference: outputs and every gradient."""

import pytest
import torch

from bmojo_core.ops.selective_scan import selective_scan

LENGTHS = (1, 63, 500, 2049, 16385)


def problem(draw, b, l, d, n, dtype, *, strided=False, full=True):
    """Random inputs; ``strided``: u, z, B and C are views of wider tensors."""
    rows = draw(b, l, 2 * d + 2 * n, dtype=dtype)
    if strided:
        u, z, B, C = rows.split((d, d, n, n), dim=-1)
    else:
        u, z, B, C = (draw(b, l, width, dtype=dtype) for width in (d, d, n, n))
    optional = dict(
        D=draw(d), z=z, delta_bias=draw(d) - 2, initial_state=draw(b, d, n)
    ) if full else dict(D=None, z=None, delta_bias=None, initial_state=None)  # fmt: skip
    A = -torch.exp(0.5 * draw(d, n))
    return dict(u=u, delta=draw(b, l, d, dtype=dtype), A=A, B=B, C=C, **optional)


def run(backend, delta_softplus=True):
    def call(**inputs):
        return selective_scan(
            **inputs, delta_softplus=delta_softplus, return_last_state=True, backend=backend
        )

    return call


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("l", LENGTHS)
def test_matches_reference(draw, compare, poisoned, l, dtype):
    inputs = problem(draw, 2 if l < 5000 else 1, l, 72 if l < 5000 else 24, 16, dtype)
    poisoned()
    compare(run("gpu"), run("reference"), inputs, dtype)


@pytest.mark.parametrize("n", (1, 3, 8, 20, 64, 128))
def test_any_number_of_states(draw, compare, n):
    compare(
        run("gpu"), run("reference"), problem(draw, 2, 130, 20, n, torch.float32), torch.float32
    )


@pytest.mark.parametrize("d", (1, 7, 64, 200))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_any_width(draw, compare, d, dtype):
    compare(run("gpu"), run("reference"), problem(draw, 2, 65, d, 16, dtype), dtype)


def test_views_of_wider_tensors(draw, compare):
    inputs = problem(draw, 2, 100, 24, 16, torch.bfloat16, strided=True)
    assert not inputs["z"].is_contiguous()
    compare(run("gpu"), run("reference"), inputs, torch.bfloat16)


def test_without_optional_inputs(draw, compare):
    inputs = problem(draw, 2, 100, 24, 16, torch.float32, full=False)
    compare(run("gpu"), run("reference"), inputs, torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_small_steps_keep_their_digits(draw, dtype):
    """softplus(x) is e^x there; 1 + e^x would round it away."""
    delta = torch.linspace(-17, -2, 256, device="cuda").to(dtype).expand(1, 1, -1)
    one = torch.ones(1, 1, 256, device="cuda", dtype=dtype)
    A, B = -torch.ones(256, 1, device="cuda"), torch.ones(1, 1, 1, device="cuda", dtype=dtype)
    _, state = selective_scan(
        one, delta, A, B, B, delta_softplus=True, return_last_state=True, backend="gpu"
    )
    want = torch.nn.functional.softplus(delta.double())[0].T
    assert ((state[0].double() - want).abs() < 1e-4 * want).all()


def test_zero_steps_hold_the_state_exactly(draw):
    inputs = problem(draw, 2, 80, 24, 16, torch.float32)
    inputs["delta_bias"] = None
    inputs["delta"] = inputs["delta"].abs()
    inputs["delta"][:, 50:] = 0
    _, padded = run("gpu", delta_softplus=False)(**inputs)
    short = {n: x[:, :50] if n in ("u", "delta", "z", "B", "C") else x for n, x in inputs.items()}
    _, alone = run("gpu", delta_softplus=False)(**short)
    assert torch.equal(padded, alone)


@pytest.mark.parametrize("split", (1, 63, 64, 777))
def test_continues_from_a_carried_state(draw, split):
    inputs = problem(draw, 1, 1000, 48, 16, torch.float32)
    whole, last = run("gpu")(**inputs)
    timed = ("u", "delta", "z", "B", "C")
    head = {n: x[:, :split] if n in timed else x for n, x in inputs.items()}
    tail = {n: x[:, split:] if n in timed else x for n, x in inputs.items()}
    first, state = run("gpu")(**head)
    second, end = run("gpu")(**tail | dict(initial_state=state))
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("states, segments", ((4, 1), (4, 5), (2, 1), (2, 2)))
def test_every_cut_computes_the_same(draw, compare, monkeypatch, states, segments, dtype):
    from bmojo_core.ops.selective_scan import gpu

    cut = gpu.Tiling(states, gpu.lanes_for(16, states), segments)
    monkeypatch.setattr(gpu, "tiling", lambda *sizes, **options: cut)
    inputs = problem(draw, 1, 640, 40, 16, dtype)
    compare(run("gpu"), run("reference"), inputs, dtype)


def test_two_runs_give_the_same_bits(draw):
    inputs = problem(draw, 2, 2049, 136, 16, torch.bfloat16)

    def once():
        leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
        y, last = run("gpu")(**leaves)
        return [y, last, *torch.autograd.grad(y.float().sum() + last.sum(), list(leaves.values()))]

    for first, second in zip(once(), once()):
        assert torch.equal(first, second)


def test_captures_into_a_graph(draw):
    inputs = problem(draw, 2, 300, 64, 16, torch.bfloat16)
    want, _ = run("gpu")(**inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, _ = run("gpu")(**inputs)
    got.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


def test_refuses_what_it_cannot_do(draw):
    inputs = problem(draw, 1, 10, 8, 16, torch.float32)
    wide = {n: x.double() for n, x in inputs.items()}
    with pytest.raises(ValueError, match="float64"):
        run("gpu")(**wide)
    with pytest.raises(ValueError, match="128"):
        run("gpu")(**problem(draw, 1, 10, 8, 129, torch.float32))
