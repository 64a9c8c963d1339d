"""Reading what the memory holds, and the gradient of that reading."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bmojo_core.ops import running_top_k
from bmojo_core.ops.memory_gather import add_taken, take_rows


@given(
    b=st.integers(1, 3), l=st.integers(1, 40), m=st.integers(1, 9), chunk=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_gradient_is_the_gathers(b, l, m, chunk, seed):
    torch.manual_seed(seed)
    scores = torch.randn(b, l).masked_fill(torch.rand(b, l) < 0.2, float("-inf"))
    index, valid = running_top_k(scores, m, chunk)
    x, y = (torch.randn(b, l, 2, 3, dtype=torch.float64, requires_grad=True) for _ in "kv")
    taken = take_rows((x, y), index)
    # written out: every place of every chunk, one by one
    for z, found in zip((x, y), taken, strict=True):
        for place in torch.cartesian_prod(*map(torch.arange, index.shape)).tolist():
            assert torch.equal(found[tuple(place)], z[place[0], index[tuple(place)]])
    dtaken = tuple(torch.randn_like(t) * valid[..., None, None] for t in taken)
    wanted = torch.autograd.grad(taken, (x, y), dtaken)
    g = tuple(torch.zeros_like(z) for z in (x, y))
    add_taken(g, dtaken, index, valid)
    for found, exact in zip(g, wanted, strict=True):
        torch.testing.assert_close(found, exact)


@given(l=st.integers(1, 60), m=st.integers(1, 9), chunk=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_token_stays_for_one_run_of_chunks(l, m, chunk, seed):
    """What the GPU's kernel relies on: who has been given up does not come back."""
    torch.manual_seed(seed)
    index, valid = running_top_k(torch.randint(0, 5, (1, l)).float(), m, chunk)
    for token in range(l):
        held = ((index == token) & valid).sum(-1)[0]
        assert held.max() <= 1
        assert (held.diff() == 1).sum() + held[0] <= 1
