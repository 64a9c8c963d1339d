"""Whole models on the GPU: three ways of reading, the CPU's float64, bits, graphs, no waiting.

Models are small and sharp (see ``peaky``), with chunks and heads that the kernels take.
"""

import copy

import peaky
import pytest
import torch

from bmojo_core import BMojoConfig, BMojoForCausalLM, DecodeGraph
from bmojo_core.config import KINDS
from bmojo_core.layers.selection import POLICIES

DEVICE = "cuda"
LENGTH, PROMPT = 75, 37
SIZES = dict(hidden_size=32, num_heads=2, window=20, memory_chunk=16)
ACCURATE, HALF = 1e-4, 1e-2  # relative errors in float32 and bfloat16

STACKS = [dict(kind=kind) for kind in KINDS] + [dict(kind="transformer", window=None)]
MEMORIES = [
    dict(wiring=wiring, memory_update=update, num_fading_tokens=m_f, num_eidetic_tokens=m_e)
    for wiring in ("stacked", "parallel")
    for update in ("chunk", "token")
    for m_f in (0, 1, 8)
    for m_e in (0, 5)
]
RULES = [
    dict(selection=rule, memory_update=update, num_eidetic_tokens=4)
    for rule in sorted(POLICIES)
    for update in ("chunk", "token")
]
OTHERS = [
    dict(store_in_window=False), dict(key_kernel=3), dict(memory_projections="separate"),
    dict(num_kv_heads=1), dict(position="none"), dict(normalize_innovation=True),
    dict(kind="mamba", fading="scalar_decay", ssm_head_dim=8),
    dict(fading="scalar_decay", ssm_head_dim=8),
]  # fmt: skip
CASES = STACKS + MEMORIES + RULES + OTHERS
cases = pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(map(str, c.values())))
decoded = pytest.mark.parametrize(
    "changes", [dict(kind=kind) for kind in KINDS] + RULES + [dict(memory_update="token")]
    + [dict(fading="scalar_decay", ssm_head_dim=8), dict(wiring="parallel")],
    ids=lambda c: "-".join(map(str, c.values())),
)  # fmt: skip


class Pair:
    """The same float32 weights on the GPU, and on the CPU in float64."""

    def __init__(self, changes, seed=0, batch=2):
        self.model = peaky.model(seed=seed, dtype=torch.float32, **{**SIZES, **changes}).to(DEVICE)
        self.exact = copy.deepcopy(self.model).cpu().double()
        self.ids = peaky.ids(batch, LENGTH, seed).to(DEVICE)
        g = torch.Generator().manual_seed(seed)
        self.scores = torch.rand(batch, LENGTH, generator=g).to(DEVICE)
        self.asks = self.model.config.selection == "oracle"

    def read(self, model, begin=0, end=LENGTH, cache=None, use_cache=False):
        device = next(model.parameters()).device
        scores = dict(memory_scores=self.scores[:, begin:end].to(device)) if self.asks else {}
        ids = self.ids[:, begin:end].to(device)
        out = model(ids, past_key_values=cache, use_cache=use_cache, **scores)
        return out.logits, out.past_key_values

    @torch.no_grad()
    def in_pieces(self, cuts):
        """Logits of reading from cut to cut, the state carried on."""
        cache, logits = None, []
        for begin, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
            out, cache = self.read(self.model, begin, end, cache, use_cache=True)
            logits.append(out)
        return torch.cat(logits, 1)


def error(got, want):
    """||got - want|| / ||want||, in float64."""
    got, want = (x.detach().double().cpu() for x in (got, want))
    return float((got - want).norm() / want.norm())


def gradients(pair, model):
    """Logits and the gradient of a projection of them for every parameter."""
    logits, _ = pair.read(model)
    g = torch.Generator().manual_seed(1)
    projection = torch.randn(logits.shape, generator=g, dtype=torch.float64)
    (logits * projection.to(logits)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), found


@cases
def test_three_ways_of_reading_agree(changes):
    pair = Pair(changes)
    with torch.no_grad():
        whole, _ = pair.read(pair.model)
    prompt_and_steps = pair.in_pieces([1, 21, *range(PROMPT, LENGTH)])
    assert error(prompt_and_steps, whole) <= ACCURATE
    assert error(pair.in_pieces([16, 33, 34, 50]), whole) <= ACCURATE


@cases
def test_logits_and_gradients_are_those_of_float64(changes):
    pair = Pair(changes, seed=1)
    logits, found = gradients(pair, pair.model)
    want_logits, want = gradients(pair, pair.exact)
    assert found.keys() == want.keys()
    wrong = {"logits": error(logits, want_logits)}
    wrong |= {name: error(found[name], want[name]) for name in want if want[name].any()}
    assert all(not found[name].any() for name in want if not want[name].any())
    wrong = {name: e for name, e in wrong.items() if not e <= ACCURATE}
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_bfloat16(kind):
    # stored by position: a rounded innovation may choose another token, which is no rounding error
    sizes = dict(selection="recency", num_eidetic_tokens=8) if kind == "bmojo" else {}
    torch.manual_seed(0)
    config = getattr(BMojoConfig, kind)(**{**peaky.SIZES, **SIZES, **sizes})
    model = BMojoForCausalLM(config).eval().bfloat16().to(DEVICE)
    exact = copy.deepcopy(model).cpu().double()
    ids = peaky.ids(2, 200).to(DEVICE)
    assert error(peaky.logits(model, ids), peaky.logits(exact, ids.cpu())) <= HALF


# -- bits, graphs, waiting ------------------------------------------------------------------------


@pytest.fixture
def deterministic():
    """The flag that the documentation names; operations of torch without such a form only warn."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def training_step(model, ids):
    """Loss and gradients of one step, left in ``grad``."""
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("changes", STACKS + [dict(memory_update="token")], ids=str)
def test_two_training_steps_give_the_same_bits(deterministic, changes, dtype):
    pair = Pair(changes, batch=3)
    model = pair.model.to(dtype).train()

    def once():
        model.zero_grad(set_to_none=True)
        loss = training_step(model, pair.ids)
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("changes", STACKS + [dict(memory_update="token")], ids=str)
def test_a_training_step_in_a_graph(changes):
    pair = Pair(changes)
    model, ids = pair.model.train(), pair.ids.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            training_step(model, ids)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training_step(model, ids)
    ids.copy_(peaky.ids(*ids.shape, seed=7))  # other tokens, in the same place
    graph.replay()
    replayed = [loss.clone()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    eager = [training_step(model, ids).detach()]
    eager += [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(replayed, eager, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def prompt(pair):
    with torch.no_grad():
        return pair.read(pair.model, 0, PROMPT, use_cache=True)[1]


@decoded
@torch.no_grad()
def test_a_decoding_step_in_a_graph(changes):
    if changes.get("selection") == "oracle":
        pytest.skip("scores from outside are no part of a recorded step")
    pair = Pair(changes)
    graph = DecodeGraph(pair.model, prompt(pair))
    steps = [graph(pair.ids[:, t : t + 1]).clone() for t in range(PROMPT, LENGTH)]
    whole, _ = pair.read(pair.model)
    assert error(torch.stack(steps, 1), whole[:, PROMPT:]) <= ACCURATE
    eager = pair.in_pieces([PROMPT, *range(PROMPT + 1, LENGTH)])[:, PROMPT:]
    assert error(torch.stack(steps, 1), eager) <= 1e-5


@decoded
@torch.no_grad()
def test_a_decoding_step_waits_for_nothing(changes):
    pair = Pair(changes)
    cache = prompt(pair)
    for t in range(PROMPT, PROMPT + 2):  # kernels are compiled
        pair.read(pair.model, t, t + 1, cache, use_cache=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(PROMPT + 2, LENGTH):  # past the beginning of two chunks
            pair.read(pair.model, t, t + 1, cache, use_cache=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
