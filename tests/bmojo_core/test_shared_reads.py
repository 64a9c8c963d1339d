"""Gradients summed where they are made are the gradients that autograd sums."""

import pytest
import torch
from torch import nn

from bmojo_core.layers import shared

X = (3, 5, 4)
INDEX = torch.tensor([[[0, 0], [2, 0]], [[1, 4], [1, 3]], [[4, 2], [4, 0]]])  # (b, n, m)
VALID = torch.tensor([[[1, 0], [1, 0]], [[1, 1], [1, 1]], [[1, 1], [1, 0]]]).bool()
KEPT = torch.ones(3, 2, 2, 4) * VALID[..., None]


def linear(out):
    return nn.Linear(4, out, bias=False).double()


READERS = {  # what a function returns, and the modules it is given
    "maps": lambda x, a, b: shared.maps(x, a, b, a),
    "halves": lambda x, a, b: shared.halves(x, a),
    "with_map": lambda x, a, b: shared.with_map(x, b),
    "with_taken": lambda x, a, b: _taken(x),
}


def _taken(x):
    """What `with_taken` gives; a place that is not valid has no reader."""
    k, v, taken_k, taken_v = shared.with_taken(x, x * 3, INDEX, VALID)
    return k, v, taken_k * KEPT, taken_v * KEPT


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_fused_gradients_are_the_plain_ones(name, frozen, monkeypatch):
    torch.manual_seed(0)
    x, a, b = torch.randn(X).double(), linear(6), linear(3)
    a.weight.requires_grad_(not frozen)
    found = []
    for fast in (False, True):
        monkeypatch.setattr(shared, "_is_fast", lambda x, fast=fast: fast)
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        outputs = READERS[name](2 * leaf, a, b)
        # every output has a reader of its own, whose gradient is a tensor of its own
        loss = sum((y.square() * torch.randn(y.shape)).sum() for y in outputs)
        parameters = [leaf, *(p for p in (a.weight, b.weight) if p.requires_grad)]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append([*outputs, *(g for g in grads if g is not None)])
    assert len(found[0]) == len(found[1])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_an_expanded_gradient_is_not_written_through(monkeypatch):
    monkeypatch.setattr(shared, "_is_fast", lambda x: True)
    leaf = torch.randn(X, requires_grad=True)
    k, v, taken, _ = shared.with_taken(leaf * 1, leaf * 1, INDEX, VALID)
    # the gradient of a sum is one number, expanded
    (k.sum() + v.sum() + (taken * KEPT).sum()).backward()
    expected = 2 * torch.ones(X)
    for row, (index, valid) in enumerate(zip(INDEX, VALID, strict=True)):
        for token in index[valid]:
            expected[row, token] += 1
    torch.testing.assert_close(leaf.grad, expected)


def test_modules_that_are_more_than_a_matrix_are_called(monkeypatch):
    monkeypatch.setattr(shared, "_is_fast", lambda x: True)
    x, biased = torch.randn(X, requires_grad=True), nn.Linear(4, 2)
    seen = []
    for listen in ("register_forward_hook", "register_full_backward_hook"):
        heard = nn.Linear(4, 2, bias=False)
        getattr(heard, listen)(lambda module, *given: seen.append(module))
        sum(y.sum() for y in shared.maps(x, heard, heard)).backward()
        assert seen.count(heard) == 2
    assert torch.equal(torch.cat(shared.halves(x, biased), -1), biased(x))
    assert torch.equal(shared.with_map(x, biased)[1], biased(x))


def test_what_runs_the_plain_equations():
    x = torch.randn(X, requires_grad=True)
    assert not shared._is_fast(x)  # a CPU: decoding there is counted in operations
    k, v, taken, _ = shared.with_taken(x, x, INDEX, VALID)
    assert k is x and v is x
    assert all(torch.equal(t, y[i]) for t, y, i in zip(taken, x, INDEX, strict=True))
