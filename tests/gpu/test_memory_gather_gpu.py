"""The memory's gather on the GPU: gradients of what `running_top_k` keeps, run by run."""

import pytest
import torch

from bmojo_core.ops import running_top_k
from bmojo_core.ops.memory_gather import add_taken, take_rows
from bmojo_core.ops.memory_gather.reference import add_taken_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
CASES = (  # b, l, tokens remembered, chunk, heads, width
    (2, 40, 5, 8, 2, 12),
    (1, 63, 3, 16, 3, 10),
    (3, 500, 64, 100, 4, 64),
    (1, 300, 7, 1, 2, 16),
    (1, 2049, 512, 64, 20, 128),
    (2, 16385, 64, 512, 4, 128),
)


def problem(draw, case, dtype):
    b, l, m, chunk, heads, width = case
    scores = draw(b, l)
    scores[:, 3:7] = float("-inf")  # padding is never remembered
    index, valid = running_top_k(scores, m, chunk)
    g = tuple(draw(b, l, heads, width, dtype=dtype) for _ in "kv")
    wider = draw(b, index.shape[1], m + 3, heads, width, dtype=dtype)  # as beside fading tokens
    return g, (wider[:, :, 3:], wider[:, :, :m] * 1), index, valid


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_are_the_reference_s(draw, case, dtype):
    g, dtaken, index, valid = problem(draw, case, dtype)
    exact = tuple(x.double() for x in g)
    add_taken_reference(exact, tuple(x.double() for x in dtaken), index, valid)
    add_taken(g, dtaken, index, valid)
    for found, wanted in zip(g, exact, strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < TOLERANCE[dtype], float(error)


def test_two_runs_give_the_same_bits(draw):
    g, dtaken, index, valid = problem(draw, CASES[4], torch.bfloat16)
    again = tuple(x.clone() for x in g)
    add_taken(g, dtaken, index, valid)
    add_taken(again, dtaken, index, valid)
    assert all(torch.equal(a, b) for a, b in zip(g, again, strict=True))


def test_what_is_taken_are_the_rows(draw):
    g, _, index, _ = problem(draw, CASES[2], torch.float32)
    (taken,) = take_rows(g[:1], index)
    rows = torch.arange(index.shape[0], device="cuda")[:, None, None]
    assert torch.equal(taken, g[0][rows, index])


def test_nothing_remembered_changes_nothing(draw):
    g, dtaken, index, valid = problem(draw, CASES[0], torch.float32)
    before = tuple(x.clone() for x in g)
    add_taken(g, dtaken, index, torch.zeros_like(valid))
    assert all(torch.equal(a, b) for a, b in zip(g, before, strict=True))
