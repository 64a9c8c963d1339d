"""Claims about decoding's compiled loops: they equal the plain equation, and step aside when
torch has to see what is computed.

The plain equation is asked for by a mode that watches every operation, or by the reference.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.layers.attention import Register, write_step
from bmojo_core.layers.eidetic import EMPTY, Tokens, insert_step
from bmojo_core.ops import causal_conv1d, innovation, selective_scan
from bmojo_core.ops.causal_conv import step as conv_step
from bmojo_core.ops.innovation import step as innovation_step
from bmojo_core.ops.rms_norm import rms_norm
from bmojo_core.ops.selective_scan import step as scan_step

BATCH, WIDTH = st.integers(1, 3), st.integers(1, 40)
SEED = st.integers(0, 2**31 - 1)


class Watching(TorchDispatchMode):
    """Does nothing but look; compiled loops give way to it."""

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def cut(x: Tensor) -> Tensor:
    """The same numbers as part of a wider tensor, as a projection's parts are."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def close(got: Tensor, want: Tensor) -> None:
    scale = max(1.0, want.abs().max().item())
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=1e-5 * scale)


def scan_arguments(seed: int, b: int, d: int, n: int) -> dict[str, Tensor]:
    shapes = {"u": (b, 1, d), "delta": (b, 1, d), "A": (d, n), "B": (b, 1, n), "C": (b, 1, n),
              "D": (d,), "z": (b, 1, d), "delta_bias": (d,),
              "initial_state": (b, d, n)}  # fmt: skip
    found = dict(zip(shapes, draw(seed, *shapes.values()), strict=True))
    found["A"] = -found["A"].abs()
    found["delta"] = 20 * found["delta"]  # softplus from nothing to the identity
    return found | {name: cut(found[name]) for name in ("z", "B", "C")}


@settings(max_examples=30, deadline=None)
@given(seed=SEED, b=BATCH, d=WIDTH, tiles=st.integers(1, 3))
def test_scan(seed, b, d, tiles):
    given = scan_arguments(seed, b, d, 16 * tiles)
    assert scan_step.runs_compiled(*list(given.values())[:8], True, given["initial_state"])
    options = {"delta_softplus": True, "return_last_state": True}
    got = selective_scan(**given, **options)
    wide = {name: x.double() for name, x in given.items()}
    for a, want in zip(got, selective_scan(**wide, **options, backend="reference"), strict=True):
        close(a, want)


@settings(max_examples=30, deadline=None)
@given(seed=SEED, b=BATCH, d=WIDTH, k=st.integers(1, 5))
def test_convolution(seed, b, d, k):
    x, weight, bias, past = draw(seed, (b, 1, d), (d, k), (d,), (b, k - 1, d))
    given = (cut(x), weight, bias, past, "silu")
    assert conv_step.runs_compiled(*given)
    wide = (t.double() for t in given[:4])
    close(causal_conv1d(*given), causal_conv1d(*wide, "silu", backend="reference"))


@settings(max_examples=30, deadline=None)
@given(seed=SEED, b=BATCH, d=WIDTH, k=st.integers(1, 5))
def test_innovation(seed, b, d, k):
    y, past = draw(seed, (b, 1, d), (b, k + 2, d))
    past = past[:, 2:]  # as a state's last outputs are
    assert innovation_step.runs_compiled(y, k, None, past)
    want = innovation(y.double(), k, past=past.double(), backend="reference")
    close(innovation(y, k, past=past), want)


@settings(max_examples=30, deadline=None)
@given(seed=SEED, b=BATCH, d=WIDTH)
def test_norm(seed, b, d):
    h, weight = draw(seed, (b, 1, d), (d,))
    norm = nn.RMSNorm(d, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(weight)
        close(rms_norm(h, norm), norm.double()(h.double()))


@settings(max_examples=60, deadline=None)
@given(seed=SEED, b=BATCH, m=st.integers(0, 5), data=st.data())
def test_insertion(seed, b, m, data):
    """Scores from a few values, so that equals are met; empty places; never an index out of it."""
    few = st.sampled_from([EMPTY, float("nan"), -1.0, 0.0, 1.0])
    scores = torch.tensor(data.draw(st.lists(few, min_size=b * m, max_size=b * m)))
    new = torch.tensor(data.draw(st.lists(few, min_size=b, max_size=b))).reshape(b, 1)
    scores = scores.reshape(b, m).nan_to_num(EMPTY, neginf=EMPTY)  # NaN is never stored
    g = torch.Generator().manual_seed(seed)
    at = torch.stack([torch.randperm(9, generator=g)[:m] for _ in range(b)])
    at = at.masked_fill(scores == EMPTY, 0)
    k, v, token_k, token_v = draw(seed, *[(b, m, 2, 3)] * 2, *[(b, 1, 2, 3)] * 2)
    token = Tokens(token_k, token_v, new, torch.full((b, 1), 9))
    if m == 0:
        assert not innovation_step.insert_compiled(Tokens(k, v, scores, at), token)
        return
    got, want = (Tokens(*(x.clone() for x in (k, v, scores, at))) for _ in range(2))
    assert innovation_step.insert_compiled(got, token)
    with Watching():
        assert not innovation_step.insert_compiled(want, token)
        insert_step(want, token)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@settings(max_examples=30, deadline=None)
@given(seed=SEED, b=BATCH, m=st.integers(0, 3), w=st.integers(1, 6))
def test_register(seed, b, m, w):
    k, v, ring_k, ring_v = draw(seed, *[(b, 1, 2, 3)] * 2, *[(b, 2, m + w, 3)] * 2)
    read = torch.randint(0, 50, (b,), generator=torch.Generator().manual_seed(seed))
    got, want = (Register(ring_k.clone(), ring_v.clone()) for _ in range(2))
    write_step(got, k, v, w, read)
    with Watching():
        write_step(want, k, v, w, read)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(got.k, ring_k)


def test_a_register_in_a_graph_is_written_by_torch():
    """So that a backward pass through what was overwritten fails instead of being wrong."""
    k, ring = draw(0, (1, 1, 2, 3), (1, 2, 4, 3))
    held = ring.clone().requires_grad_() * 1
    energy = held.square().sum()
    with torch.no_grad():
        write_step(Register(held, held.clone()), k, k, 4, torch.tensor([2]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        energy.backward()


def test_loops_step_aside():
    """For gradients, modes, transforms, tracing, and everything that is to be refused."""
    given = scan_arguments(0, 1, 4, 16)
    names = list(given)

    def taken(**changes) -> bool:
        *first, state = {**given, **changes}.values()
        return scan_step.runs_compiled(*first, True, state)

    assert taken()
    for name in names:
        assert not taken(**{name: given[name].double()})
        assert not taken(**{name: given[name][..., :-1]})
        assert not taken(**{name: given[name].clone().requires_grad_()})
        with torch.no_grad():
            assert taken(**{name: given[name].clone().requires_grad_()})
    for name in ("D", "z", "delta_bias", "initial_state"):
        assert not taken(**{name: None})
    with Watching():
        assert not taken()
    assert not torch.func.vmap(lambda u: torch.tensor(taken()))(torch.ones(2)).any()
    with torch.autograd.forward_ad.dual_level():
        assert not taken()


def test_nan_reaches_every_output_it_should():
    given = scan_arguments(0, 1, 4, 16)
    given["u"] = given["u"].index_fill(2, torch.tensor([1]), float("nan"))
    y, x = selective_scan(**given, delta_softplus=True, return_last_state=True)
    assert y.isnan().flatten().tolist() == [False, True, False, False]
    assert x.isnan().all(-1).flatten().tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", ["mamba", "hybrid", "bmojo_f", "bmojo"])
def test_a_model_decodes_the_same_with_and_without(kind):
    """A batch of two, over several chunks, with the states that the loops write in place."""
    torch.manual_seed(0)
    model = BMojoForCausalLM(BMojoConfig.preset("tiny", kind, vocab_size=50)).eval()
    ids = torch.randint(50, (2, 60))
    with torch.no_grad():
        first = model(ids[:, :20], use_cache=True).past_key_values
        second = copy.deepcopy(first)
        for t in range(20, 60):
            got = model(ids[:, t : t + 1], past_key_values=first).logits
            with Watching():
                want = model(ids[:, t : t + 1], past_key_values=second).logits
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for a, b in zip(first.tensors(), second.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("listen", ["register_forward_pre_hook", "register_forward_hook"])
def test_who_listens_to_a_norm_hears_every_token(listen):
    """A hook that changes what the norm is given or says changes it in decoding, too."""
    norm, h = torch.nn.RMSNorm(8, eps=1e-5), torch.randn(2, 1, 8)
    change = (lambda m, x: (2 + x[0],)) if "pre" in listen else (lambda m, x, y: 2 + y)
    getattr(norm, listen)(change)
    with torch.no_grad():
        assert torch.equal(rms_norm(h, norm), norm(h))
