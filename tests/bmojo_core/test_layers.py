"""Which keys a query of a B'MOJO layer sees, token by token as the specification says it.

The oracle is written from the paper: Python sets for what is visible, a loop for Algorithm 1's
memory, one softmax over the list of visible tokens.  It shares no code with the layer.
"""

import pickle

import peaky
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo_core import BMojoConfig
from bmojo_core.layers import bmojo as bmojo_layer
from bmojo_core.layers import mamba
from bmojo_core.layers.attention import Attention
from bmojo_core.layers.bmojo import MemoryAttention
from bmojo_core.layers.feedforward import GatedMLP, MixtureOfExperts
from bmojo_core.layers.mamba import Mamba
from bmojo_core.layers.selection import POLICIES, Observed
from bmojo_core.ops import selective_scan


def innovation(y, taps):
    """e_t = || y_t - mean(y_{t-1} .. y_{t-taps}) ||^2 / d, outputs before the start being 0."""
    scores = []
    for t in range(len(y)):
        past = [y[t - j] if t >= j else torch.zeros_like(y[0]) for j in range(1, taps + 1)]
        scores.append(float((y[t] - sum(past) / taps).square().mean()))
    return scores


def remembered(scores, stored, capacity):
    """Algorithm 1, step 4, over the positions ``stored``: insert if larger than the minimum."""
    memory = []
    for t in stored:
        if len(memory) < capacity:
            memory.append(t)
        elif capacity:
            smallest = min(memory, key=lambda s: (scores[s], -s))  # of equals, the younger leaves
            if scores[t] > scores[smallest]:
                memory[memory.index(smallest)] = t
    return sorted(memory)


def visible(c, t, scores):
    """Window, fading and eidetic positions that query t sees."""
    w, r = c.window, c.fading_stride
    window = list(range(max(0, t - w + 1), t + 1))
    at_once = c.store_in_window and c.selection != "accumulated_attention"
    if c.memory_update == "token":  # Algorithm 1: fading y_{t-w}, memory updated before the query
        newest, youngest = t - w, (t if at_once else t - w)
    else:  # appendix B.2: memory summarises what is before the chunk
        begin = t // c.memory_chunk * c.memory_chunk
        newest = begin - 1
        youngest = begin - 1 if at_once else begin - w
    fading = [newest - r * j for j in range(c.num_fading_tokens) if newest - r * j >= 0]
    return window, fading, remembered(scores, range(youngest + 1), c.num_eidetic_tokens)


def expected_output(layer, u, y, scores):
    """The layer's output (l, d) for one row, query by query."""
    c, weights = layer.config, layer.projections
    g, p, x = c.num_kv_heads, c.head_dim, c.num_heads // c.num_kv_heads
    own_maps = c.memory_projections == "separate"

    def turned(heads, t):
        return heads if weights.rotary is None else weights.rotary(heads[None, None], at(t))[0, 0]

    def at(t):
        return torch.tensor([[t]])

    def content(t):  # what keys and values read
        if not c.key_kernel:
            return u[t]
        taps = range(min(c.key_kernel, t + 1))
        return sum(layer.key_conv[:, c.key_kernel - 1 - j] * u[t - j] for j in taps)

    def key_value(token, t, memory):
        k_proj = layer.memory_k_proj if memory and own_maps else weights.k_proj
        v_proj = layer.memory_v_proj if memory and own_maps else weights.v_proj
        return turned(k_proj(token).view(g, p), t), v_proj(token).view(g, p)

    def normalised(token):
        return layer.fading_norm(token) if c.normalize_fading else token

    rows = []
    for t in range(len(u)):
        window, fading, eidetic = visible(c, t, scores)
        tokens = [key_value(content(s), s, memory=False) for s in window]
        tokens += [key_value(normalised(y[s]), s, memory=True) for s in fading]
        tokens += [key_value(content(s), s, memory=True) for s in eidetic]
        k, v = (torch.stack(part).repeat_interleave(x, dim=1) for part in zip(*tokens, strict=True))
        q = turned(weights.q_proj(u[t]).view(g * x, p), t)
        attention = (torch.einsum("hp,jhp->hj", q, k) / p**0.5).softmax(-1)
        rows.append(weights.o_proj(torch.einsum("hj,jhp->hp", attention, v).flatten()))
    return torch.stack(rows)


def learned_scores(y, weights):
    """|| y_t - sum_j a_j y_{t-j} ||^2 / d, token by token."""
    past = torch.cat([torch.zeros(weights.shape[1], y.shape[1], dtype=y.dtype), y])
    errors = []
    for t in range(len(y)):
        before = past[t : t + weights.shape[1]].flip(0)  # the latest first
        errors.append(float((y[t] - (weights.T * before).sum(0)).square().mean()))
    return errors


def received_scores(c, queries, keys):
    """What each token gets from the queries that have it in their window, mean over heads."""
    total = [0.0] * len(keys)
    keys = keys.repeat_interleave(c.num_heads // c.num_kv_heads, dim=1)
    for t in range(len(keys)):
        first = max(0, t - c.window + 1)
        logits = torch.einsum("hp,shp->hs", queries[t], keys[first : t + 1]) / c.head_dim**0.5
        for s, share in enumerate(logits.softmax(-1).mean(0).tolist(), start=first):
            total[s] += share
    return total


def scores_of(layer, y, queries, keys, given_scores):
    c = layer.config
    if c.num_eidetic_tokens == 0:
        return [0.0] * len(y)
    if c.selection == "learned_predictor":
        return learned_scores(y, layer.predictor)
    if c.selection == "accumulated_attention":
        return received_scores(c, queries, keys)
    if c.selection == "innovation":
        return innovation(y, c.innovation_taps)
    if c.selection == "recency":
        return list(range(len(y)))
    if c.selection == "oracle":
        return given_scores.tolist()
    seen = Observed(
        y[None], torch.zeros(1, c.innovation_taps, y.shape[1], dtype=y.dtype), keys[None],
        torch.zeros_like(keys[None, 0]), torch.arange(len(y))[None], None,
        c.innovation_taps, c.selection_seed,
    )  # fmt: skip
    return POLICIES[c.selection](seen)[0].float().tolist()


def choices(**fixed):
    """Settings that the paper leaves open, drawn; ``fixed`` ones stay."""
    free = {
        "window": st.integers(1, 6), "memory_chunk": st.sampled_from([None, 1, 3, 8]),
        "num_fading_tokens": st.sampled_from([0, 1, 3]),
        "num_eidetic_tokens": st.sampled_from([0, 1, 4]), "fading_stride": st.integers(1, 3),
        "innovation_taps": st.integers(1, 4), "num_kv_heads": st.sampled_from([1, 2]),
        "memory_update": st.sampled_from(["chunk", "token"]),
        "selection": st.sampled_from(sorted(POLICIES)), "key_kernel": st.sampled_from([0, 1, 3]),
        "memory_projections": st.sampled_from(["shared", "separate"]),
        "store_in_window": st.booleans(), "normalize_fading": st.booleans(),
        "position": st.sampled_from(["none", "rope"]), "selection_seed": st.integers(0, 5),
    }  # fmt: skip
    return st.fixed_dictionaries(free | {name: st.just(value) for name, value in fixed.items()})


def sharp_layer(changes, seed):
    """B'MOJO's attention with sharp peaks, in float64."""
    c = BMojoConfig(**{**peaky.SIZES, **changes})
    return peaky.sharpen(MemoryAttention(c).double(), seed)


def inputs(layer, length, seed, batch=1):
    g = torch.Generator().manual_seed(seed)
    d = layer.config.hidden_size
    u, y = (torch.randn(batch, length, d, generator=g, dtype=torch.float64) for _ in range(2))
    return u, y, torch.rand(batch, length, generator=g, dtype=torch.float64)


def run(layer, u, y, given_scores, lengths=None):
    given_scores = given_scores if layer.config.selection == "oracle" else None
    return layer(u, y, None, None, lengths, False, given_scores)[0]


@settings(max_examples=60)
@given(choices(), st.integers(1, 25), st.integers(0, 99))
def test_every_query_attends_to_what_the_specification_says(changes, length, seed):
    layer = sharp_layer(changes, seed)
    u, y, given_scores = inputs(layer, length, seed, batch=2)
    with torch.no_grad():
        got = run(layer, u, y, given_scores)
        keys = layer.projections.keys_values(layer._content(u, None, None)[0], positions(u))[0]
        queries = layer.projections.queries(u, positions(u))
        for i in range(2):
            scores = scores_of(layer, y[i], queries[i], keys[i], given_scores[i])
            want = expected_output(layer, u[i], y[i], scores)
            torch.testing.assert_close(got[i], want, rtol=1e-10, atol=1e-10)


def positions(u):
    return torch.arange(u.shape[1]).expand(u.shape[0], -1)


@settings(max_examples=20)
@given(choices(store_in_window=False, key_kernel=0, selection="innovation"), st.integers(0, 99))
def test_gradients_reach_exactly_w_inputs_and_the_memory(changes, seed):
    """Brute force: query t depends on u_s or y_s if and only if they are in its visible set."""
    layer = sharp_layer(changes, seed)
    c, length = layer.config, 16
    u, y, scores = inputs(layer, length, seed)
    u.requires_grad_(), y.requires_grad_()
    out = run(layer, u, y, scores)
    scores = innovation(y[0].detach(), c.innovation_taps)
    for t in range(length):
        du, dy = torch.autograd.grad(out[0, t].sum(), (u, y), retain_graph=True, allow_unused=True)
        seen_u = set(du[0].abs().sum(-1).nonzero().flatten().tolist())
        seen_y = set() if dy is None else set(dy[0].abs().sum(-1).nonzero().flatten().tolist())
        window, fading, eidetic = visible(c, t, scores)
        assert not set(window) & set(eidetic)
        assert seen_u == {t, *window, *eidetic}
        assert seen_y == set(fading)


@settings(max_examples=30)
@given(choices(), st.integers(0, 99))
def test_the_operation_is_given_exactly_w_plus_m_f_plus_m_e_keys(changes, seed):
    """Counted in the arguments of the operation, late enough that every memory is full."""
    layer = sharp_layer(changes, seed)
    c = layer.config
    length = 3 * c.window + 10 + c.num_fading_tokens * c.fading_stride + 2 * c.memory_chunk
    calls = []

    def record(q, k, v, mem_k=None, mem_v=None, mem_valid=None, *, window, chunk, key_valid=None):
        assert key_valid is None
        calls.append((window, chunk, mem_valid))
        return torch.zeros_like(q)

    original, bmojo_layer.memory_attention = bmojo_layer.memory_attention, record
    try:
        run(layer, *inputs(layer, length, seed))
    finally:
        bmojo_layer.memory_attention = original
    ((window, chunk, valid),) = calls
    beyond = c.num_fading_tokens + c.num_eidetic_tokens
    memory = 0 if valid is None else int(valid[0, (length - 1) // chunk].sum())
    assert window + memory == c.window + beyond


def test_more_eidetic_places_than_past_tokens_stay_empty():
    c = BMojoConfig(**{**peaky.SIZES, "num_eidetic_tokens": 50})
    layer = peaky.sharpen(MemoryAttention(c).double())
    u, y, scores = inputs(layer, 12, 0)
    with torch.no_grad():
        want = expected_output(layer, u[0], y[0], innovation(y[0], c.innovation_taps))
        torch.testing.assert_close(run(layer, u, y, scores)[0], want, rtol=1e-10, atol=1e-10)


def test_a_fresh_key_convolution_is_the_identity():
    sizes = {**peaky.SIZES, "layer_types": ["bmojo"]}
    plain = peaky.model(**sizes)
    convolved = peaky.model(**sizes, key_kernel=3)
    convolved.load_state_dict(plain.state_dict(), strict=False)
    convolved.model.layers[0].attention.reset_parameters()
    tokens = peaky.ids(2, 20)
    assert torch.equal(peaky.logits(plain, tokens), peaky.logits(convolved, tokens))


@settings(max_examples=20)
@given(
    st.sampled_from([None, 1, 4, 7]), st.sampled_from([1, 2]), st.sampled_from(["none", "rope"]),
    st.integers(1, 20),
)  # fmt: skip
def test_attention_is_softmax_over_its_window(window, groups, position, length):
    c = BMojoConfig(**peaky.SIZES, num_kv_heads=groups, position=position)
    layer = peaky.sharpen(Attention(c, window).double())
    g = torch.Generator().manual_seed(length)
    u = torch.randn(1, length, c.hidden_size, generator=g, dtype=torch.float64)
    with torch.no_grad():
        q = layer.projections.queries(u, positions(u))
        k, v = layer.projections.keys_values(u, positions(u))
        k, v = (s.repeat_interleave(c.num_heads // groups, 2).transpose(1, 2) for s in (k, v))
        t = torch.arange(length)
        age = t[:, None] - t
        sees = (age >= 0) & (age < (window or length))
        want = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=sees)
        want = layer.projections.output(want.transpose(1, 2))
        torch.testing.assert_close(layer(u)[0], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norms", [None, "learned", "plain"])
@pytest.mark.parametrize("fading", ["selective", "scalar_decay"])
def test_mamba_is_its_recurrence(norms, fading):
    """The layer against appendix E's equations, one token at a time."""
    c = BMojoConfig(**peaky.SIZES, ssm_norms=norms, ssm_bias=True, fading=fading, ssm_head_dim=8)
    layer = peaky.sharpen(Mamba(c).double())
    u = inputs(layer_config(c), 12, 3)[0][0]
    e, n = c.ssm_intermediate_size, c.state_size
    assert layer.A_log.shape == ((e, n) if fading == "selective" else (e // 8,))
    alike = e // layer.A_log.shape[0]  # channels with one decay
    A = -layer.A_log.exp().view(-1, layer.A_log[0].numel()).repeat_interleave(alike, 0)
    kernel, x = layer.conv1d.weight[:, 0], torch.zeros(e, n, dtype=torch.float64)
    past, rows = [torch.zeros(e, dtype=torch.float64)] * (c.conv_kernel - 1), []
    with torch.no_grad():
        for u_t in u:
            inner, z = layer.in_proj(u_t).chunk(2)
            past.append(inner)
            taps = torch.stack(past[-c.conv_kernel :], 1)
            v = F.silu((kernel * taps).sum(1) + layer.conv1d.bias)
            parts = layer.x_proj(v).split((c.dt_rank, n, n))
            r, B, C = parts if norms is None else (f(s) for f, s in zip(layer.norms, parts))
            delta = F.softplus(layer.dt_proj(r)).repeat_interleave(alike)
            x = torch.exp(delta[:, None] * A) * x + (delta * v)[:, None] * B
            rows.append(layer.out_proj((x @ C + layer.D * v) * F.silu(z)))
        torch.testing.assert_close(layer(u[None])[0][0], torch.stack(rows), rtol=1e-10, atol=1e-10)


def layer_config(config):
    """Anything with a ``config``, for ``inputs``."""
    return type("Layer", (), {"config": config})


def test_a_mixture_of_one_expert_is_that_expert_and_more_are_a_weighted_sum():
    c = BMojoConfig(**peaky.SIZES, num_experts=3, num_experts_per_tok=2, layer_types=["moe"])
    mixture = peaky.sharpen(MixtureOfExperts(c).double())
    u = inputs(layer_config(c), 9, 1)[0]
    with torch.no_grad():
        probability = mixture.router(u[0]).softmax(-1, dtype=torch.float32)
        for t in range(9):
            best = probability[t].argsort(descending=True)[:2]
            want = sum(probability[t, i].double() * mixture.experts[i](u[0, t]) for i in best)
            torch.testing.assert_close(mixture(u)[0, t], want, rtol=1e-10, atol=1e-10)
    assert isinstance(mixture.experts[0], GatedMLP)


@pytest.mark.parametrize("fading", ["selective", "scalar_decay"])
@pytest.mark.parametrize("kind", ["transformer", "mamba", "hybrid", "bmojo"])
def test_a_model_can_be_pickled(kind, fading):
    model, tokens = peaky.model(kind, fading=fading), peaky.ids(2, 11)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(peaky.logits(again, tokens), peaky.logits(model, tokens))


def test_rates_are_computed_wide_from_narrow_weights(monkeypatch):
    """exp(A_log) rounded to bfloat16 would be wrong by up to 2^-9, and fading by that times l."""
    layer, given = peaky.model("mamba", dtype=torch.bfloat16).model.layers[0].inner, {}

    def seen(u, delta, A, *rest, **options):
        given["A"] = A
        return selective_scan(u, delta, A, *rest, **options)

    monkeypatch.setattr(mamba, "selective_scan", seen)
    with torch.no_grad():
        layer(torch.randn(1, 5, 16, dtype=torch.bfloat16))
    assert given["A"].dtype == torch.float32
    torch.testing.assert_close(given["A"].double(), -layer.A_log.double().exp())
