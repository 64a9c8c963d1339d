"""A decode step that stays in its own tensors is the decode step; the graph itself needs a GPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.decode_graph import (
    DecodeGraph,
    chunk_begins,
    memory_full,
    step_in_place,
    what_is_known,
)
from bmojo_core.layers import rows

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "window": 8}
MEMORY = {"num_fading_tokens": 2, "num_eidetic_tokens": 6}
CASES = [
    ("mamba", {}), ("hybrid", {}), ("bmojo_f", MEMORY), ("bmojo", MEMORY),
    ("bmojo", {**MEMORY, "memory_update": "token"}), ("bmojo", {**MEMORY, "wiring": "parallel"}),
    ("bmojo", {**MEMORY, "selection": "accumulated_attention"}),
    ("bmojo", {**MEMORY, "fading": "scalar_decay", "key_kernel": 3}),
]  # fmt: skip


def made(kind, changes):
    torch.manual_seed(0)
    return BMojoForCausalLM(getattr(BMojoConfig, kind)(**SIZES, **changes)).eval()


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_a_step_in_place_is_the_step_and_moves_no_tensor(kind, changes):
    model, ids = made(kind, changes), torch.randint(50, (3, 40))
    with torch.no_grad():
        plain = model(ids[:, :15], use_cache=True).past_key_values
        placed = plain.map(torch.Tensor.clone)
        before = [t.data_ptr() for t in placed.tensors()]
        for t in range(15, 40):
            token = ids[:, t : t + 1]
            expected = model(token, past_key_values=plain, use_cache=True).logits[:, -1]
            torch.testing.assert_close(step_in_place(model, token, placed), expected)
    assert [t.data_ptr() for t in placed.tensors()] == before
    for a, b in zip(plain.tensors(), placed.tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_be_captured_is_refused():
    model = made("bmojo", MEMORY)
    with torch.no_grad():
        cache = model(torch.zeros(1, 4, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="model must be on a CUDA device, it is on cpu"):
        DecodeGraph(model, cache)


class Operations(TorchDispatchMode):
    """How many operations torch is asked for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += 1
        return function(*arguments, **(options or {}))


GATED = ("bmojo", {**MEMORY, "memory_gates": True})


@pytest.mark.parametrize(("kind", "changes"), [*CASES, GATED])
@pytest.mark.parametrize("beginnings", [(15, 15, 15), (1, 2, 3), (30, 17, 22)])
def test_the_host_counts_as_the_device_would(kind, changes, beginnings, monkeypatch):
    """As on an accelerator, where nothing may be asked: known counts change what is done, not y."""
    model, ids = made(kind, changes), torch.randint(50, (3, 60))
    for gates in model.parameters():  # open ones, where there are any
        gates.data += 0.5 * (gates == 0)
    mask = torch.arange(30) >= 30 - torch.tensor(beginnings)[:, None]
    with torch.no_grad():
        plain = model(ids[:, :30], attention_mask=mask, use_cache=True).past_key_values
        known, asked = (plain.map(torch.Tensor.clone) for _ in range(2))
        read, counts = plain.position.tolist(), []
        for t in range(30, 60):
            token = ids[:, t : t + 1]
            want = model(token, past_key_values=plain, use_cache=True).logits[:, -1]
            with monkeypatch.context() as patch:
                patch.setattr(rows, "_answers", lambda x: False)
                with Operations() as unknowing:
                    torch.testing.assert_close(step_in_place(model, token, asked), want)
                what = what_is_known(model.config, known, read)
                with rows.known(what), Operations() as knowing:
                    torch.testing.assert_close(step_in_place(model, token, known), want)
            counts.append((chunk_begins(model.config, read), knowing.count, unknowing.count))
            read = [r + 1 for r in read]
    assert read == plain.position.tolist()
    assert all(fewer <= all_ for _, fewer, all_ in counts)
    if kind.startswith("bmojo") and "memory_update" not in changes and len(set(beginnings)) == 1:
        assert [t for t, (begins, _, _) in enumerate(counts) if begins] == [1, 9, 17, 25]
        assert max(n for begins, n, _ in counts if not begins) < min(n for *_, n in counts)


def test_what_the_host_can_know():
    model = made("bmojo", MEMORY)
    with torch.no_grad():
        short, long = (model(torch.zeros(2, n, dtype=torch.long), use_cache=True).past_key_values
                       for n in (5, 40))  # fmt: skip
    assert not memory_full(short) and memory_full(long)
    assert what_is_known(model.config, long, [40, 40]) == (True, True, True)
    assert what_is_known(model.config, short, [5, 9]) == (False, False, False)
    assert chunk_begins(model.config, [8, 3]) and not chunk_begins(model.config, [9, 3])
    assert chunk_begins(made("bmojo", {"memory_update": "token"}).config, [3])
    assert not chunk_begins(made("mamba", {}).config, [8])


def test_what_one_thread_knows_another_does_not_believe(monkeypatch):
    """One thread makes a graph of long rows while another decodes rows that have just begun."""
    model, ids = made("bmojo", MEMORY), torch.randint(50, (1, 24))

    @torch.no_grad()
    def decoded():
        state = model(ids[:, :10], use_cache=True).past_key_values
        return torch.cat(
            [model(ids[:, t : t + 1], past_key_values=state).logits for t in range(10, 24)], 1
        )

    monkeypatch.setattr(rows, "_answers", lambda x: False)  # as on an accelerator
    want = decoded()
    with rows.known(rows.Known(False, True, True)), ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(decoded).result(), want)
        assert not torch.equal(decoded(), want)  # here it is believed
