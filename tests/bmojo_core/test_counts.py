"""Counted work against work that was watched: loops over pairs, and operations as they pass."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.dispatch import as_kernels, nbytes
from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.inspect import counts
from bmojo_core.layers import attention as attention_layer
from bmojo_core.layers import bmojo as bmojo_layer
from bmojo_core.layers import mamba as mamba_layer
from bmojo_core.layers.mamba import Mamba

SIZES = {
    "vocab_size": 7, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "window": 8, "state_size": 4,
}  # fmt: skip
KINDS = ("transformer", "mamba", "hybrid", "bmojo_f", "bmojo")
FADINGS = pytest.mark.parametrize(
    "fading", [{}, {"fading": "scalar_decay", "ssm_head_dim": 8}], ids=["selective", "scalar_decay"]
)


def config(kind: str, **changes) -> BMojoConfig:
    sizes = {**SIZES, **changes}
    if kind == "transformer":
        sizes.pop("window")
    return getattr(BMojoConfig, kind)(**sizes)


@given(length=st.integers(1, 60), window=st.one_of(st.none(), st.integers(1, 70)))
def test_pairs_in_the_window(length, window):
    pairs = sum(
        s <= t and (window is None or s > t - window) for t in range(length) for s in range(length)
    )
    assert counts.visible_in_window(length, window) == pairs


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 50), chunk=st.integers(1, 12), m_f=st.integers(0, 4),
    m_e=st.integers(0, 12), stride=st.integers(1, 3),
)  # fmt: skip
def test_pairs_with_memory(length, chunk, m_f, m_e, stride):
    """Against the memories that a running layer shows to an inspector."""
    c = config("bmojo", num_fading_tokens=m_f, num_eidetic_tokens=m_e, memory_chunk=chunk,
               fading_stride=stride, num_layers=1)  # fmt: skip
    torch.manual_seed(0)
    model, seen = BMojoForCausalLM(c).eval(), []
    model.model.layers[0].attention.watchers.append(seen.append)
    with torch.no_grad():
        model(torch.randint(7, (1, length)), use_cache=False)
    valid = seen[0].memory.valid[0].sum(1).tolist()
    pairs = sum(valid[t // chunk] for t in range(length))
    assert counts.visible_in_memory(c, length) == pairs


class Elements(TorchDispatchMode):
    """Elements that went through an exponential, and flops of products."""

    def __init__(self):
        super().__init__()
        self.exponentials = self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in ("exp", "softplus", "silu", "sigmoid"):
            self.exponentials += args[0].numel()
        if name in ("mm", "addmm"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@FADINGS
def test_exponentials_of_a_scan(fading):
    """The plain recurrence (float64 takes it): every exp, softplus and silu that it calls."""
    c = config("mamba", conv_bias=False, **fading)
    layer = Mamba(c).double()
    with torch.no_grad(), Elements() as seen:
        layer(torch.randn(2, 9, c.hidden_size, dtype=torch.float64))
    of_A = layer.A_log.numel()  # A = -exp(A_log), once a call
    assert counts.sublayer(c, "mamba", 2, 9).exponentials == seen.exponentials - of_A
    states = c.ssm_intermediate_size * c.state_size
    assert counts.scan(c, 2, 9).scan_steps == 2 * 9 * states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [5, 40])
@FADINGS
def test_products(kind, length, fading):
    """Every matrix product with weights that a whole model asks for."""
    c = config(kind, num_fading_tokens=2, num_eidetic_tokens=3, **fading)
    with torch.device("meta"):
        model = BMojoForCausalLM(c).model
    ids = torch.empty(3, length, dtype=torch.long, device="meta")
    with as_kernels(), torch.no_grad(), Elements() as seen:
        model(ids, use_cache=False)
    assert counts.forward(c, 3, length).product_flops == seen.flops


@pytest.mark.parametrize("kind", KINDS)
def test_attention_flops_and_exponentials(kind):
    """2 p flops for a score and 2 p for its value, an exponential for each head and pair."""
    c, l = config(kind, num_fading_tokens=1, num_eidetic_tokens=4), 21
    w = l if kind == "transformer" else c.window
    pairs = 0
    for t in range(l):
        begin = t // 8 * 8
        memory = (min(1, begin) + min(4, begin)) if kind == "bmojo" else 0
        pairs += min(t + 1, w) + (min(1, begin) if kind == "bmojo_f" else memory)
    expected = 0 if kind == "mamba" else c.num_layers * 3 * 4 * pairs
    done = counts.forward(c, 3, l)
    assert done.attention_flops == expected * 4 * c.head_dim
    t, e, f = 3 * l, c.ssm_intermediate_size, c.intermediate_size
    scans = c.layer_types.count("mamba") + c.layer_types.count("bmojo")
    others = scans * t * e * (c.state_size + 3) + c.layer_types.count("feedforward") * t * f
    assert done.exponentials == expected + others


def watch(monkeypatch, places) -> list[int]:
    """Bytes that functions, each named by (module, name), are handed and give back from now on."""
    seen = [0]

    def watched(function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            given = {k: v for k, v in kwargs.items() if k != "key_valid"}
            first = out[0] if isinstance(out, tuple) else out
            seen[0] += nbytes((args, given)) + nbytes(first)
            return out

        return call

    for module, name in places:
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return seen


MIXING = [(mamba_layer, "selective_scan"), (mamba_layer, "scalar_scan"),
          (bmojo_layer, "memory_attention"), (attention_layer, "memory_attention")]  # fmt: skip
AROUND = [(mamba_layer, "causal_conv1d"), (F, "linear"), (F, "rms_norm"), (F, "silu")]


@pytest.mark.parametrize("kind", KINDS)
@FADINGS
def test_bytes(kind, fading, monkeypatch):
    """What linear maps, norms and kernels were handed and gave back, and two sums a block.

    Small parameters (norm weights, A, D, biases, masks) are left out of the count: 2 %.
    """
    c, (b, l) = config(kind, num_fading_tokens=2, num_eidetic_tokens=3, **fading), (3, 160)
    with torch.device("meta"):
        model = BMojoForCausalLM(c).model.to(torch.bfloat16)
    ids = torch.empty(b, l, dtype=torch.long, device="meta")
    with as_kernels(), torch.no_grad(), monkeypatch.context() as patches:  # undone inside out
        mixing, around = watch(patches, MIXING), watch(patches, AROUND)
        model(ids, use_cache=False)
    t, d, size = b * l, c.hidden_size, 2
    sums = 3 * size * t * d * (2 * c.num_layers)
    gates = 3 * size * t * c.intermediate_size * c.layer_types.count("feedforward")
    chunks = l // c.memory_chunk
    groups, layers = c.num_kv_heads * c.head_dim, c.layer_types.count("bmojo")
    gathered = 4 * size * b * chunks * c.num_eidetic_tokens * groups * layers
    mixing[0] += size * t * d * layers * bool(c.num_eidetic_tokens)  # the innovation's
    core = sum(counts.core(c, sublayer, b, l).bytes for sublayer in c.layer_types)
    assert core == pytest.approx(mixing[0], rel=0.02)
    counted = counts.forward(c, b, l).bytes
    assert counted == pytest.approx(mixing[0] + around[0] + sums + gates + gathered, rel=0.02)


def test_sums_of_work():
    a = counts.product(2, 3, 5) + counts.elementwise(7, 1, exponentials=4)
    assert (a.product_flops, a.exponentials, a.bytes) == (60, 4, 2 * (6 + 15 + 10) + 16)


def test_bad_input():
    c = BMojoConfig(**SIZES)
    with pytest.raises(ValueError, match=r"sublayer must be .* got 'moe'"):
        counts.sublayer(c, "moe", 1, 1)
    with pytest.raises(ValueError, match="memory_update 'chunk'"):
        counts.visible_in_memory(BMojoConfig(**SIZES, memory_update="token"), 9)
