"""Scalar scan kernels against the float64 reference: outputs and every gradient."""

import pytest
import torch

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.ops.scalar_scan import scalar_scan

LENGTHS = (1, 63, 500, 2049, 16385)
TIMED = ("u", "delta", "z", "B", "C")


def problem(draw, b, l, h, p, n, dtype, *, strided=False, full=True):
    """Random inputs; ``strided``: u, z, B and C are views of wider tensors."""
    d = h * p
    rows = draw(b, l, 2 * d + 2 * n, dtype=dtype)
    if strided:
        u, z, B, C = rows.split((d, d, n, n), dim=-1)
    else:
        u, z, B, C = (draw(b, l, width, dtype=dtype) for width in (d, d, n, n))
    optional = dict(
        D=draw(d), z=z, delta_bias=draw(h) - 2, initial_state=draw(b, d, n)
    ) if full else dict(D=None, z=None, delta_bias=None, initial_state=None)  # fmt: skip
    A = -torch.exp(0.5 * draw(h))
    return dict(u=u, delta=draw(b, l, h, dtype=dtype), A=A, B=B, C=C, **optional)


def run(backend, delta_softplus=True):
    def call(**inputs):
        return scalar_scan(
            **inputs, delta_softplus=delta_softplus, return_last_state=True, backend=backend
        )

    return call


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("l", LENGTHS)
def test_matches_reference(draw, compare, poisoned, l, dtype):
    h, p, n = (5, 64, 64) if l < 5000 else (8, 8, 16)
    inputs = problem(draw, 2 if l < 5000 else 1, l, h, p, n, dtype)
    poisoned()
    compare(run("gpu"), run("reference"), inputs, dtype)


@pytest.mark.parametrize("n", (1, 3, 16, 20, 64, 100, 128))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_any_number_of_states(draw, compare, n, dtype):
    compare(run("gpu"), run("reference"), problem(draw, 2, 130, 6, 20, n, dtype), dtype)


@pytest.mark.parametrize("h, p", ((8, 1), (6, 7), (9, 16), (5, 50), (11, 64)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_any_width(draw, compare, h, p, dtype):
    compare(run("gpu"), run("reference"), problem(draw, 2, 65, h, p, 16, dtype), dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_widest_heads_with_the_most_states(draw, compare, dtype):
    compare(run("gpu"), run("reference"), problem(draw, 2, 200, 6, 64, 128, dtype), dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_programs_that_take_several_heads(draw, compare, monkeypatch, dtype):
    from bmojo_core.ops.scalar_scan import gpu

    monkeypatch.setattr(gpu, "ENOUGH", 1)
    compare(run("gpu"), run("reference"), problem(draw, 2, 200, 19, 32, 32, dtype), dtype)


def test_views_of_wider_tensors(draw, compare):
    inputs = problem(draw, 2, 100, 3, 24, 16, torch.bfloat16, strided=True)
    assert not inputs["z"].is_contiguous()
    compare(run("gpu"), run("reference"), inputs, torch.bfloat16)


def test_without_optional_inputs(draw, compare):
    inputs = problem(draw, 2, 100, 3, 24, 16, torch.float32, full=False)
    compare(run("gpu"), run("reference"), inputs, torch.float32)


def test_half_precision_holds_large_states(draw):
    """The state passes what float16 can hold, its outputs do not."""
    half = dict(device="cuda", dtype=torch.float16)
    u, B, C = (torch.full((1, 640, w), v, **half) for w, v in ((2, 16.0), (16, 16.0), (16, 1e-4)))
    arguments = u, torch.ones(1, 640, 1, **half), torch.full((1,), -1e-4, device="cuda"), B, C
    y, state = scalar_scan(*arguments, return_last_state=True, backend="gpu")
    want = scalar_scan(*(x.double() for x in arguments), backend="reference")
    assert state.max() > 1e5
    assert (y.double() - want).norm() < 1e-2 * want.norm()


def test_zero_steps_hold_the_state_exactly(draw):
    inputs = problem(draw, 2, 200, 3, 24, 16, torch.float32)
    inputs["delta_bias"] = None
    inputs["delta"] = inputs["delta"].abs()
    inputs["delta"][:, 64:] = 0
    _, padded = run("gpu", delta_softplus=False)(**inputs)
    short = {n: x[:, :64] if n in TIMED else x for n, x in inputs.items()}
    _, alone = run("gpu", delta_softplus=False)(**short)
    assert torch.equal(padded, alone)


@pytest.mark.parametrize("split", (1, 63, 64, 777))
def test_continues_from_a_carried_state(draw, split):
    inputs = problem(draw, 1, 1000, 4, 48, 16, torch.float32)
    whole, last = run("gpu")(**inputs)
    head = {n: x[:, :split] if n in TIMED else x for n, x in inputs.items()}
    tail = {n: x[:, split:] if n in TIMED else x for n, x in inputs.items()}
    first, state = run("gpu")(**head)
    second, end = run("gpu")(**tail | dict(initial_state=state))
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-4)


def test_long_forgetting_loses_no_digits(draw, compare):
    inputs = problem(draw, 1, 300, 2, 16, 16, torch.float32)
    inputs["delta_bias"] = None
    inputs["delta"] = inputs["delta"].abs() * 20
    inputs["delta"][:, 1::2] *= 1e-4
    compare(run("gpu", False), run("reference", False), inputs, torch.float32)


def test_two_runs_give_the_same_bits(draw):
    inputs = problem(draw, 2, 2049, 7, 64, 64, torch.bfloat16)

    def once():
        leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
        y, last = run("gpu")(**leaves)
        return [y, last, *torch.autograd.grad(y.float().sum() + last.sum(), list(leaves.values()))]

    for first, second in zip(once(), once()):
        assert torch.equal(first, second)


def test_captures_into_a_graph(draw):
    inputs = problem(draw, 2, 300, 4, 64, 64, torch.bfloat16)
    want, _ = run("gpu")(**inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, _ = run("gpu")(**inputs)
    got.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


def test_wider_heads_take_plain_torch(draw, compare):
    """What "auto" does where the kernels end."""
    inputs = problem(draw, 1, 100, 2, 80, 16, torch.float32)
    compare(run("auto"), run("reference"), inputs, torch.float32)


def test_refuses_what_it_cannot_do(draw):
    inputs = problem(draw, 1, 10, 2, 8, 16, torch.float32)
    wide = {n: x.double() for n, x in inputs.items()}
    with pytest.raises(ValueError, match="float64"):
        run("gpu")(**wide)
    with pytest.raises(ValueError, match="128"):
        run("gpu")(**problem(draw, 1, 10, 2, 8, 129, torch.float32))


def test_a_model_reads_in_pieces_what_it_reads_at_once():
    sizes = dict(vocab_size=50, hidden_size=128, num_layers=2, num_heads=2, window=32)
    config = BMojoConfig.bmojo(**sizes, num_eidetic_tokens=8, fading="scalar_decay")
    model = BMojoForCausalLM(config).cuda().eval()
    ids = torch.randint(50, (2, 90), device="cuda")
    with torch.no_grad():
        whole, cache, parts = model(ids, use_cache=False).logits, None, []
        for piece in ids.split([40, 37, *[1] * 13], 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    error = (torch.cat(parts, 1) - whole).abs().max() / whole.abs().max()
    assert error <= 1e-4, float(error)
