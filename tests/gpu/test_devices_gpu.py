"""Kernels run where their tensors are, not where the current device is."""

import pytest
import torch

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.decode_graph import DecodeGraph
from bmojo_core.ops import (
    causal_conv1d,
    innovation,
    memory_attention,
    running_top_k,
    scalar_scan,
    selective_scan,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices; torch sees fewer"
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scan(u, A, B):
    return selective_scan(u, u.sigmoid(), A, B, B, u[0, 0], u)


def scalar(u, A, B):
    return scalar_scan(u, u[..., :4].sigmoid(), A[:4, 0], B, B, u[0, 0], u)


def convolution(u, A, B):
    return causal_conv1d(u, A[:, :4], u[0, 0], activation="silu")


def attention(u, A, B):
    q = u.unflatten(-1, (4, 16))
    memory = q[:, :32].unflatten(1, (4, 8))
    return memory_attention(q, q, q, memory, memory, window=32, chunk=40)


def kept(u, A, B):
    score = innovation(u, 4)
    return torch.cat([score, running_top_k(score, 8, chunk=40)[0].flatten(1).float()], 1)


@pytest.mark.parametrize("operation", [scan, scalar, convolution, attention, kept])
def test_the_second_device_while_the_first_is_current(operation):
    inputs = draw(2, 160, 64), -draw(64, 8, seed=1).exp(), draw(2, 160, 8, seed=2)
    found = []
    for device in ("cuda:0", "cuda:1"):
        leaves = [x.to(device).requires_grad_() for x in inputs]
        y = operation(*leaves)
        assert torch.cuda.current_device() == 0 and y.device == torch.device(device)
        gradients = [] if operation is kept else torch.autograd.grad(
            y.square().sum(), leaves, allow_unused=True)  # fmt: skip
        found.append([x.cpu() for x in (y.detach(), *gradients) if x is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # bit for bit


@torch.no_grad()
def test_a_decode_graph_on_the_second_device():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "window": 16}
    model = BMojoForCausalLM(BMojoConfig.bmojo(**sizes)).to("cuda:1").eval()
    ids = torch.randint(50, (2, 60), device="cuda:1")
    plain = model(ids[:, :20], use_cache=True).past_key_values
    graph = DecodeGraph(model, plain.map(torch.Tensor.clone))
    for t in range(20, 60):
        token = ids[:, t : t + 1]
        expected = model(token, past_key_values=plain, use_cache=True).logits[:, -1]
        torch.testing.assert_close(graph(token), expected, rtol=1e-4, atol=1e-5)
