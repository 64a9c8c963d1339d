"""The state: its size, its copies, and its life on disk."""

import peaky
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_invariants import MODELS

from bmojo_core import BMojoCache, BMojoConfig, BMojoForCausalLM
from bmojo_core.cache import leaves, row_shapes, state_bytes
from bmojo_core.config import KINDS
from bmojo_core.ops.innovation.step import insert_compiled


@torch.no_grad()
def step(model, tokens, cache=None, **inputs):
    out = model(tokens, past_key_values=cache, use_cache=True, **inputs)
    return out.logits, out.past_key_values


def values(cache):
    return [t.clone() for t in cache.tensors()]


def unchanged(cache, before):
    return all(torch.equal(a, b) for a, b in zip(cache.tensors(), before, strict=True))


@settings(max_examples=25)
@given(MODELS, st.integers(1, 20), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_bytes_are_the_formula(changes, length, one_by_one, dtype):
    model = peaky.model(dtype=dtype, **changes)
    scores = {"memory_scores": torch.rand(2, length)}
    if one_by_one:
        cache = None
        for t in range(length):
            now = {k: v[:, t : t + 1] for k, v in scores.items()}
            _, cache = step(model, peaky.ids(2, length)[:, t : t + 1], cache, **now)
    else:
        _, cache = step(model, peaky.ids(2, length), **scores)
    assert cache.nbytes == state_bytes(model.config, 2, dtype, length)
    shapes = {name: tuple(t.shape[1:]) for name, t in leaves("", cache.states)}
    assert shapes == row_shapes(model.config, length)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.tensors()}
    if length > 1:  # no tensor of the state keeps a longer one alive
        assert sum(held.values()) <= cache.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_in_half_precision(kind):
    model = peaky.model(kind, dtype=torch.bfloat16)
    _, cache = step(model, peaky.ids(3, 11))
    assert cache.nbytes == state_bytes(model.config, 3, torch.bfloat16, 11)


@pytest.mark.parametrize("update", ["chunk", "token"])
def test_a_fork_sees_nothing_of_the_other(update):
    model = peaky.model(memory_update=update)
    tokens = peaky.ids(2, 40)
    _, cache = step(model, tokens[:, :13])
    fork, before = cache.fork(), values(cache)
    assert all(a is b for a, b in zip(cache.tensors(), fork.tensors(), strict=True))
    third = fork.fork()
    for t in range(13, 30):
        step(model, tokens[:, t : t + 1], fork)
        assert unchanged(cache, before) and unchanged(third, before)
    want = peaky.logits(model, torch.cat([tokens[:, :13], tokens[:, 30:]], 1))[:, 13:]
    for twin in (cache, third):
        got = torch.cat([step(model, tokens[:, t : t + 1], twin)[0] for t in range(30, 40)], 1)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("copy", [BMojoCache.detach, lambda c: c.to("cpu"), BMojoCache.fork])
def test_whatever_shares_memory_is_copied_before_it_is_written(copy):
    model = peaky.model()
    _, cache = step(model, peaky.ids(1, 9))
    twin, before = copy(cache), values(cache)
    step(model, peaky.ids(1, 1), twin)
    assert unchanged(cache, before)
    after = values(twin)
    step(model, peaky.ids(1, 1), cache)
    assert unchanged(twin, after)


@pytest.mark.parametrize("kind", ["bmojo", "hybrid"])
def test_the_register_is_read_in_one_run(kind):
    """Keys of a head lie side by side, however the state came about: that is the step's speed."""
    model, tokens = peaky.model(kind), peaky.ids(2, 30)
    _, cache = step(model, tokens[:, :17])
    _, cache = step(model, tokens[:, 17:23], cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    _, cache = step(model, tokens[:, 23:24], cache)
    registers = [s.window if kind == "bmojo" else s for s in cache.states if hasattr(s, "window")
                 or hasattr(s, "v")]  # fmt: skip
    assert len(registers) == 2
    for register in registers:
        assert register.k.shape[1] == model.config.num_kv_heads
        assert register.k.is_contiguous() and register.v.is_contiguous()


def test_reading_without_asking_for_the_state_leaves_it_alone():
    model = peaky.model(num_layers=2, layer_types=["bmojo", "sliding_attention"])
    _, cache = step(model, peaky.ids(1, 9))
    before = values(cache)
    with torch.no_grad():
        first = model(peaky.ids(1, 1), past_key_values=cache, use_cache=False).logits
    assert unchanged(cache, before) and cache.columns == 9
    torch.testing.assert_close(step(model, peaky.ids(1, 1), cache)[0], first, rtol=0, atol=1e-12)


def test_steps_under_autograd_keep_their_history():
    """Gradients through token-by-token reading are those of reading at once."""
    model, tokens = peaky.model(num_fading_tokens=2).train(), peaky.ids(1, 14)
    model(tokens, use_cache=False).logits[:, -1].square().sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cache = None
    for t in range(14):
        out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    out.logits[:, -1].square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-8, atol=1e-9, msg=name)


def test_rows_can_be_chosen_and_repeated():
    model, tokens = peaky.model(), peaky.ids(3, 20)
    _, cache = step(model, tokens[:, :12])
    rows = torch.tensor([2, 0, 2])
    want, _ = step(model, tokens[rows][:, 12:], cache.select(rows))
    full = peaky.logits(model, tokens[rows])[:, 12:]
    torch.testing.assert_close(want, full, rtol=1e-10, atol=1e-10)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 1, 4]))
    assert cache.position.tolist() == [12, 12, 12]
    torch.testing.assert_close(step(model, tokens[rows][:, 12:], cache)[0], full)


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    model = peaky.model(layer_types=["bmojo", "feedforward", "attention", "mamba"])
    _, cache = step(model, peaky.ids(2, 12))
    cache.save(tmp_path / "state.safetensors")
    again = BMojoCache.load(tmp_path / "state.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    assert again.columns == 12 and unchanged(again, values(cache))
    new = peaky.ids(2, 3)
    assert torch.equal(step(model, new, cache)[0], step(model, new, again)[0])


@pytest.mark.parametrize("damage", ["cut", "header", "bit", "empty"])
def test_a_damaged_state_is_refused(tmp_path, damage):
    path = tmp_path / "state.safetensors"
    step(peaky.model(), peaky.ids(1, 12))[1].save(path)
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    elif damage == "header":
        raw[2] ^= 0x40
    elif damage == "bit":
        raw[-100] ^= 0x01
    else:
        raw = b""
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"state\.safetensors"):
        BMojoCache.load(path)


def test_a_failed_save_leaves_the_previous_state(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    _, cache = step(peaky.model(), peaky.ids(1, 12))
    cache.save(path)
    whole = path.read_bytes()

    def full_disk(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("bmojo_core.cache.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        cache.save(path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_a_state_moves_between_dtypes():
    model = peaky.model(dtype=torch.float32)
    _, cache = step(model, peaky.ids(1, 12))
    half = cache.to(torch.bfloat16)
    assert half.nbytes == state_bytes(model.config, 1, torch.bfloat16)
    got, _ = step(peaky.model(dtype=torch.float32).to(torch.bfloat16), peaky.ids(1, 3), half)
    want, _ = step(model, peaky.ids(1, 3), cache)
    assert (got.float() - want).abs().mean() < 0.2 * want.abs().mean()
    assert all(t.device.type == "meta" for t in cache.to("meta").tensors())


@pytest.mark.parametrize("kind", ["transformer", "hybrid", "bmojo"])
def test_a_state_of_another_dtype_is_refused_by_name(kind):
    """As when the model has been converted after it began to read."""
    torch.manual_seed(0)
    model = BMojoForCausalLM(BMojoConfig.preset("tiny", kind, vocab_size=50)).eval()
    ids = torch.randint(50, (1, 9))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model.to(torch.bfloat16)
        with pytest.raises(ValueError, match="must (hold|have)"):
            model(ids[:, :1], past_key_values=cache.fork())
        assert model(ids[:, :1], past_key_values=cache.to(torch.bfloat16)).logits.isfinite().all()


@pytest.mark.parametrize("selection", ["innovation", "random", "accumulated_attention"])
def test_scores_are_float32_in_a_float64_model(selection):
    """Also those that grow while a token waits: a state's size is known beforehand."""
    config = BMojoConfig.preset("tiny", "bmojo", vocab_size=50, selection=selection, window=4)
    model = BMojoForCausalLM(config).double().eval()
    with torch.no_grad():
        cache = model(torch.arange(9)[None], use_cache=True).past_key_values
        cache = model(torch.arange(2)[None], past_key_values=cache).past_key_values
    assert cache.nbytes == state_bytes(config, 1, torch.float64)


OTHERS = [
    ({"num_kv_heads": 1}, r"window\.k"), ({"num_eidetic_tokens": 5}, r"window\.k"),
    ({"window": 6}, r"window\.k"), ({"state_size": 5}, r"ssm\.x"),
    ({"selection": "key_diversity"}, "key_sum"), ({"layer_types": ["mamba"]}, "tail"),
    ({"layer_types": ["bmojo", "bmojo"]}, "1 sublayers, the model has 2"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), OTHERS)
def test_a_state_of_another_configuration_is_refused_by_name(changes, named):
    """The loops that write a state in place trust its shapes."""
    sizes = {"layer_types": ["bmojo"], "num_kv_heads": 2, "window": 4}
    _, cache = step(peaky.model(**sizes), peaky.ids(2, 9))
    other = peaky.model(**(sizes | changes))
    with pytest.raises(ValueError, match=named):
        step(other, peaky.ids(2, 1), cache)
    step(peaky.model(**sizes), peaky.ids(2, 1), cache)


def test_a_loop_in_place_leaves_what_does_not_fit():
    """Whoever calls it: it does not write beyond what it was given."""
    place = torch.zeros(1, 3, dtype=torch.long)
    best = (torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4), torch.zeros(1, 3), place)
    k, v = torch.ones(2, 1, 1, 2, 4)
    assert not insert_compiled(best, (k, v, torch.ones(1, 1), place[:, :1]))
    assert insert_compiled(best, (k[:, :, :1], v[:, :, :1], torch.ones(1, 1), place[:, :1]))


def test_a_stack_without_memory_counts_what_it_read():
    model = peaky.model(layer_types=["feedforward"])
    whole = step(model, peaky.ids(2, 5))[0]
    _, cache = step(model, peaky.ids(2, 5)[:, :3])
    assert cache.position.tolist() == [3, 3]
    torch.testing.assert_close(step(model, peaky.ids(2, 5)[:, 3:], cache)[0], whole[:, 3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_read_in_inference_mode_can_be_gone_on_from(dtype):
    """What was made there may not be written elsewhere, so the state is copied once."""
    model, ids = peaky.model().to(dtype), peaky.ids(2, 16)
    with torch.inference_mode():
        cache = model(ids[:, :12], use_cache=True).past_key_values
        want = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
                for t in range(12, 16)]  # fmt: skip
        cache = model(ids[:, :12], use_cache=True).past_key_values
    with torch.no_grad():
        got = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
               for t in range(12, 16)]  # fmt: skip
    torch.testing.assert_close(got, want)
