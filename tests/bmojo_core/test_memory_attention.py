"""One softmax over the window and the chunk's memory: what is visible, its gradients, its cost."""

import subprocess
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bmojo_core.ops.memory_attention import memory_attention

LENGTHS = (1, 31, 32, 63, 500)


def random_case(b, l, h, g, p, r=0, chunk=None, m=0, seed=0, dtype=torch.float64, masks=True):
    """Tensors (q, k, v, mem_k, mem_v) and keywords; the masks hide a third of all keys."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=gen, dtype=dtype)

    leaves = [normal(b, l, h, p), normal(b, r + l, g, p), normal(b, r + l, g, p)]
    keywords = {}
    if chunk is not None:
        c = -(-l // chunk)
        leaves += [normal(b, c, m, g, p), normal(b, c, m, g, p)]
        keywords["chunk"] = chunk
        if masks:
            keywords["mem_valid"] = torch.rand(b, c, m, generator=gen) > 0.33
    if masks:
        keywords["key_valid"] = torch.rand(b, r + l, generator=gen) > 0.33
    return leaves, keywords


def value_and_gradients(leaves, keywords, backend, **more):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = memory_attention(*leaves, **keywords, **more, backend=backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, leaves, upstream, materialize_grads=True)]


def assert_same(leaves, keywords, window):
    expected = value_and_gradients(leaves, keywords, "reference", window=window)
    found = value_and_gradients(leaves, keywords, "cpu", window=window)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_by_hand():
    """Equal scores: the output is the mean of everything visible."""
    q = torch.zeros(1, 4, 1, 1)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1)
    mem_v = torch.tensor([[100.0], [200.0]]).view(1, 2, 1, 1, 1)
    out = memory_attention(q, v, v, mem_v, mem_v, window=2, chunk=2)
    assert out.flatten().tolist() == pytest.approx([101 / 2, 103 / 3, 206 / 3, 212 / 3])


def test_scale_and_its_default():
    (q, k, v), _ = random_case(1, 3, 1, 1, 4, masks=False)
    weights = torch.softmax(torch.einsum("p,jp->j", q[0, 2, 0], k[0, :, 0]) / 2.0, 0)
    torch.testing.assert_close(memory_attention(q, k, v, window=3)[0, 2, 0], weights @ v[0, :, 0])
    torch.testing.assert_close(
        memory_attention(q, k, v, window=3, scale=1.0), memory_attention(2 * q, k, v, window=3)
    )


@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("window", [1, 16, 40, None])
@pytest.mark.parametrize(("chunk", "m"), [(None, 0), (1, 3), (16, 5), (70, 4)])
def test_fast_path_equals_reference_with_all_gradients(l, window, chunk, m):
    assert_same(*random_case(2, l, 2, 1, 3, r=5, chunk=chunk, m=m), window)


@settings(max_examples=60)
@given(
    b=st.integers(1, 2),
    l=st.integers(1, 150),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    p=st.integers(1, 5),
    r=st.sampled_from([0, 0, 3, 40]),
    window=st.one_of(st.none(), st.integers(1, 90), st.just(10_000)),
    chunk=st.one_of(st.none(), st.integers(1, 90), st.just(10_000)),
    m=st.integers(0, 4),
    masks=st.booleans(),
)
def test_any_shape(b, l, heads, p, r, window, chunk, m, masks):
    assert_same(*random_case(b, l, *heads, p, r=r, chunk=chunk, m=m, masks=masks), window)


def visible_by_perturbation(backend, l, r, window, chunk, m, key_valid, mem_valid):
    """Which (query, key) and (query, memory token) pairs matter, found by moving each value."""
    leaves, _ = random_case(1, l, 1, 1, 2, r=r, chunk=chunk, m=m, masks=False)
    keywords = {"window": window, "chunk": chunk, "backend": backend}
    keywords |= {"key_valid": key_valid, "mem_valid": mem_valid}
    before = memory_attention(*leaves, **keywords)

    def moved(which, position):
        changed = [x.clone() for x in leaves]
        changed[which][position] += 1.0
        out = memory_attention(*changed, **keywords)
        return (out != before).flatten(2).any(-1)[0].tolist()

    near = [moved(2, (0, j)) for j in range(r + l)]
    far = [moved(4, (0, i, s)) for i in range(-(-l // chunk)) for s in range(m)]
    return near, far


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("l", "r", "window", "chunk", "m"),
    [(13, 0, 4, 4, 2), (13, 6, 4, 5, 2), (9, 2, 5, 1, 2), (20, 3, None, 8, 1), (70, 1, 3, 33, 1)],
)
def test_visible_set_is_exactly_the_specification(backend, l, r, window, chunk, m):
    gen = torch.Generator().manual_seed(l)
    c = -(-l // chunk)
    key_valid = torch.rand(1, r + l, generator=gen) > 0.2
    mem_valid = torch.rand(1, c, m, generator=gen) > 0.2
    near, far = visible_by_perturbation(backend, l, r, window, chunk, m, key_valid, mem_valid)
    w = l + r if window is None else window
    assert near == [
        [i + r - w < j <= i + r and bool(key_valid[0, j]) for i in range(l)] for j in range(r + l)
    ]
    assert far == [
        [i // chunk == own and bool(mem_valid[0, own, s]) for i in range(l)]
        for own in range(c)
        for s in range(m)
    ]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("window", "chunk"), [(3, 4), (3, 1), (3, 16), (None, 4), (None, None)])
def test_queries_that_see_nothing_are_zero_with_zero_gradient(backend, window, chunk):
    leaves, keywords = random_case(1, 16, 2, 1, 3, chunk=chunk, m=2)
    keywords["key_valid"] = torch.arange(16)[None] >= 8
    if chunk is not None:
        keywords["mem_valid"] = torch.zeros(1, -(-16 // chunk), 2, dtype=torch.bool)
    out, *grads = value_and_gradients(leaves, keywords, backend, window=window)
    assert torch.equal(out[:, :8], torch.zeros_like(out[:, :8]))
    assert (out[:, 8:] != 0).all()
    assert all(torch.isfinite(x).all() for x in grads)
    for hidden in (x[:, :8] for x in grads[:3]):
        assert torch.equal(hidden, torch.zeros_like(hidden))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in grads[3:])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("window", "chunk"), [(3, 1), (3, 8), (None, None)])
def test_gradcheck(backend, window, chunk):
    leaves, keywords = random_case(1, 9, 2, 1, 2, r=1, chunk=chunk, m=2)
    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(
        lambda *x: memory_attention(*x, window=window, backend=backend, **keywords), leaves
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("window", "chunk"), [(40, 32), (40, 1), (None, None)])
def test_half_precision_rounds_only_its_inputs_and_output(dtype, backend, window, chunk):
    leaves, keywords = random_case(1, 100, 2, 1, 16, chunk=chunk, m=8, dtype=torch.float32)
    half = [x.to(dtype) for x in leaves]
    out = memory_attention(*half, window=window, backend=backend, **keywords)
    exact = memory_attention(*[x.double() for x in half], window=window, **keywords)
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation inside returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("window", [7, 32, 300])
@pytest.mark.parametrize(("chunk", "m"), [(None, 0), (1, 4), (32, 4), (37, 4), (10**6, 4)])
def test_largest_intermediate_grows_linearly(window, chunk, m):
    def largest(l):
        leaves, keywords = random_case(1, l, 1, 1, 2, chunk=chunk, m=m, dtype=torch.float32)
        with LargestTensor() as seen:
            leaves = [x.requires_grad_() for x in leaves]
            memory_attention(*leaves, window=window, **keywords).sum().backward()
        return seen.elements

    short, long = largest(2048), largest(8192)
    assert long <= 4.1 * short
    assert long <= 8192 * 2 * (window + m + 256)  # (l, l) would be 8192 per query


COMPILE = """
import torch
from bmojo_core.ops import innovation, memory_attention, running_top_k

def run(q, k, v, mem_k, mem_v, y, keys):
    index, valid = running_top_k(innovation(y), 3, 4)
    out = memory_attention(q, k, v, mem_k, mem_v, valid, window=5, chunk=4, key_valid=keys)
    token = memory_attention(q[:, :4], k[:, :4], v[:, :4], mem_k, mem_v, window=5, chunk=1)
    return out, token, memory_attention(q, k, v, window=None), index

torch.manual_seed(0)
x = [torch.randn(2, 16, 2, 4, requires_grad=True) for _ in range(3)]
x += [torch.randn(2, 4, 3, 2, 4, requires_grad=True) for _ in range(2)]
y, keys = torch.randn(2, 16, 6), torch.rand(2, 16) > 0.3
results = []
for f in (run, torch.compile(run, fullgraph=True, backend="eager")):
    *outs, index = f(*x, y, keys)
    results.append([*outs, index, *torch.autograd.grad(sum(o.sum() for o in outs), x)])
for a, b in zip(*results, strict=True):
    torch.testing.assert_close(a, b)
"""


def test_operations_compile_to_one_graph():
    """In a fresh interpreter, for signatures checked at run time cannot be traced."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_flash_attn_gets_the_window_it_counts_in_left_neighbours(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        calls.append((softmax_scale, causal, window_size))
        return q

    monkeypatch.setitem(
        sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func)
    )
    from bmojo_core.ops.memory_attention.flash import memory_attention_flash

    q = torch.zeros(1, 2, 1, 4)
    for window in (3, None):
        memory_attention_flash(q, q, q, None, None, None, window, None, None, 0.5)
    assert calls == [(0.5, True, (2, 0)), (0.5, True, (-1, 0))]
    valid = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="flash_attn"):
        memory_attention_flash(q, q, q, None, None, None, 3, None, valid, 0.5)


SHAPED = torch.zeros(2, 6, 4, 8)
MEMORY = torch.zeros(2, 3, 5, 2, 8)
VALID = torch.ones(2, 3, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"q": SHAPED[0]}, "q"),
        ({"q": SHAPED[:0]}, "q"),
        ({"q": SHAPED[:, :0]}, "q"),
        ({"q": SHAPED.long()}, "q"),
        ({"q": SHAPED[:, :, :3]}, "multiple of g"),
        ({"q": torch.zeros(2, 9, 4, 8)}, "k must hold"),
        ({"k": torch.zeros(1, 6, 2, 8)}, "k must"),
        ({"k": SHAPED[:, :, :2].double()}, "k must"),
        ({"v": SHAPED[:, :, :1]}, "v must"),
        ({"mem_k": MEMORY[:, :2]}, "mem_k"),
        ({"mem_k": None}, "mem_k and mem_v"),
        ({"mem_v": MEMORY[:, :, :4]}, "mem_v"),
        ({"mem_v": MEMORY.double()}, "mem_v"),
        ({"mem_valid": VALID[:, :, :4]}, "mem_valid"),
        ({"mem_valid": VALID.float()}, "mem_valid"),
        ({"key_valid": torch.ones(2, 5, dtype=torch.bool)}, "key_valid"),
        ({"key_valid": torch.ones(2, 6)}, "key_valid"),
        ({"window": 0}, "window"),
        ({"window": 2.0}, "window"),
        ({"chunk": 0}, "chunk"),
        ({"chunk": None}, "chunk"),
        ({"backend": "sdpa"}, "backend"),
        ({"backend": "gpu"}, "backend"),
        ({"backend": "flash_attn"}, "backend"),
    ],
)
def test_bad_input_names_the_argument(change, names):
    good = {"q": SHAPED, "k": SHAPED[:, :, :2], "v": SHAPED[:, :, :2], "window": 3, "chunk": 2}
    good |= {"mem_k": MEMORY, "mem_v": MEMORY, "mem_valid": VALID}
    with pytest.raises(ValueError, match=names):
        memory_attention(**{**good, **change})
