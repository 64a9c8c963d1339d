"""What inspection says of a reading is what the reading did; the page shows it and fetches nothing.

Oracles: Algorithm 1 as a loop over tokens, and a dense softmax over everything a query may see.
"""

import json
import re

import browser
import matplotlib
import numpy as np
import pytest
import torch

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.inspect import (
    LayerTrace,
    attention_shares,
    memory_page,
    memory_trace,
    text_heat,
    timeline,
)
from bmojo_core.inspect.page import embeddable_json, held, layer_data
from bmojo_core.layers.bmojo import BMojo

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LENGTH = 19


def tiny(**changes):
    torch.manual_seed(changes.pop("weights", 0))
    sizes = dict(
        vocab_size=32, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, state_size=3,
        window=4, num_fading_tokens=2, num_eidetic_tokens=3, initializer_range=0.5,
    )  # fmt: skip
    model = BMojoForCausalLM(BMojoConfig.bmojo(**{**sizes, **changes})).eval()
    for name, weight in model.named_parameters():
        if name.endswith("memory_gate"):
            weight.data.copy_(torch.linspace(0.0, 0.9, 4))
    return model


def sequence(rows=1):
    return torch.randint(0, 32, (rows, LENGTH), generator=torch.Generator().manual_seed(7))


WAYS = {
    "chunk": {},
    "short chunks": {"memory_chunk": 3},
    "token": {"memory_update": "token"},
    "after the window": {"store_in_window": False},
    "after the window, token": {"store_in_window": False, "memory_update": "token"},
    "no fading": {"num_fading_tokens": 0},
    "gated": {"memory_gates": True},
    "gated, token": {"memory_gates": True, "memory_update": "token"},
}


@pytest.fixture(params=WAYS, scope="module")
def read(request):
    """(model, traces, what the watchers saw, outputs of the SSMs) of one reading of two rows."""
    model, seen, outputs = tiny(**WAYS[request.param]), {}, {}
    for i, block in enumerate(model.model.layers):
        block.attention.watchers.append(lambda w, i=i: seen.__setitem__(i, w))
        block.ssm.register_forward_hook(lambda m, a, out, i=i: outputs.__setitem__(i, out[0]))
    traces = memory_trace(model, sequence(2))
    assert [len(block.attention.watchers) for block in model.model.layers] == [1, 1]
    return model, traces, seen, outputs


# -- values against oracles -----------------------------------------------------------------------


def algorithm_1(scores, size):
    """The memory after each token, one token at a time: insert if larger than the smallest."""
    memory, after = [], [[]]
    for t, e in enumerate(scores):
        if len(memory) < size:
            memory.append((e, t))
        else:
            smallest = min(memory, key=lambda m: (m[0], -m[1]))
            if e > smallest[0]:
                memory.remove(smallest)
                memory.append((e, t))
        after.append(sorted(t for _, t in memory))
    return after


def storing_delay(config):
    """How old a token is when it may first be stored."""
    if config.store_in_window:
        return 0
    return config.window - (config.memory_update == "chunk")


def test_scores_are_innovations_of_the_ssms_outputs(read):
    model, traces, _, outputs = read
    candidates = LENGTH - storing_delay(model.config)
    for trace in traces:
        assert torch.isneginf(trace.score[:, candidates:]).all()
        y = torch.nn.functional.pad(outputs[trace.layer].double(), (0, 0, 4, 0))
        for t in range(candidates):
            error = y[:, t + 4] - y[:, t : t + 4].mean(1)
            torch.testing.assert_close(
                trace.score[:, t].double(), error.square().mean(1), rtol=1e-4, atol=1e-7
            )


def test_positions_are_those_of_algorithm_1(read):
    model, traces, *_ = read
    config = model.config
    for trace in traces:
        chunk = 1 if config.memory_update == "token" else config.memory_chunk
        assert trace.chunk == chunk and trace.window == config.window
        assert trace.position.shape[1] == -(-LENGTH // chunk)
        for row in range(2):
            after = algorithm_1(trace.score[row].tolist(), config.num_eidetic_tokens)
            for n in range(trace.position.shape[1]):
                read_before = n + 1 if config.memory_update == "token" else n * chunk
                expected = after[max(0, min(read_before, LENGTH) - storing_delay(config))]
                assert trace.remembered(row, n) == expected
            assert set(trace.stored(row)) == {
                t for n in range(trace.position.shape[1]) for t in trace.remembered(row, n)
            }


def test_mass_is_that_of_a_dense_softmax(read):
    """All keys of the row and all memories in one score vector per query and head, masked.

    Behind a gate g the output is g times that of all weights and 1 - g times that of the window's.
    """
    model, traces, seen, _ = read
    fading = model.config.num_fading_tokens
    for trace in traces:
        w = seen[trace.layer]
        heads = w.q.shape[2] // w.k.shape[2]
        for row in range(2):
            for t in range(LENGTH):
                n = t // trace.chunk
                expected = torch.zeros(LENGTH + w.memory.k.shape[2], dtype=torch.float64)
                for h in range(w.q.shape[2]):
                    keys = torch.cat([w.k[row, :, h // heads], w.memory.k[row, n, :, h // heads]])
                    score = keys.double() @ w.q[row, t, h].double() / keys.shape[1] ** 0.5
                    sees = [t - trace.window < s <= t for s in range(LENGTH)]
                    sees = torch.tensor([*sees, *w.memory.valid[row, n].tolist()])
                    weight = torch.where(sees, score.exp(), 0.0)
                    near = weight * (torch.arange(len(weight)) < LENGTH)
                    g = 1.0 if w.gate is None else w.gate[h].item()
                    mixed = g * weight / weight.sum() + (1 - g) * near / near.sum()
                    expected += mixed / w.q.shape[2]
                parts = expected.split((LENGTH, fading, w.memory.k.shape[2] - fading))
                got = trace.mass[row, t].double()
                torch.testing.assert_close(
                    got, torch.stack([p.sum() for p in parts]), rtol=1e-4, atol=1e-6
                )
                torch.testing.assert_close(
                    trace.eidetic_mass[row, t].double(), parts[2], rtol=1e-4, atol=1e-6
                )


def test_a_closed_gate_leaves_all_to_the_window():
    model = tiny(memory_gates=True)
    for block in model.model.layers:
        block.attention.memory_gate.data.zero_()
    for trace in memory_trace(model, sequence()):
        torch.testing.assert_close(trace.mass[..., 0], torch.ones(1, LENGTH))
        assert not trace.mass[..., 1:].any() and not trace.eidetic_mass.any()


def test_attention_to_a_token_adds_up_to_the_eidetic_share(read):
    _, traces, *_ = read
    for trace in traces:
        total = sum(trace.attention_to(position, 1) for position in trace.stored(1))
        torch.testing.assert_close(total, trace.mass[1, :, 2])
        for position in trace.stored(1):
            looked = trace.attention_to(position, 1).nonzero().flatten().tolist()
            allowed = [
                t for t in range(LENGTH) if position in trace.remembered(1, t // trace.chunk)
            ]
            assert looked == allowed


def test_what_is_evicted_was_held_before_and_never_returns(read):
    _, traces, *_ = read
    for trace in traces:
        chunks = trace.position.shape[1]
        for position, first, gone in held(trace):
            inside = [position in trace.remembered(0, n) for n in range(chunks)]
            last = chunks if gone is None else gone
            assert inside == [first <= n < last for n in range(chunks)]
            assert ((position, gone) in trace.evicted()) == (gone is not None)


def trace_by_hand():
    position = torch.tensor([[[0, 0], [1, 0], [1, 3], [3, 5]]])
    valid = torch.tensor([[[0, 0], [1, 0], [1, 1], [1, 1]]]).bool()
    mass = torch.tensor([[[1.0, 0.0, 0.0]] * 4 + [[0.5, 0.2, 0.3]] * 4])
    each = torch.zeros(1, 8, 2)
    each[0, 4:, 0], each[0, 4:, 1] = 0.1, 0.2
    score = torch.tensor([[1.0, 6.0, 0.5, 7.0, 2.0, 9.0, 3.0, float("inf")]])
    return LayerTrace(5, score, position, valid, mass, each, 2, 3)


def test_a_trace_by_hand():
    trace = trace_by_hand()
    assert [trace.remembered(0, n) for n in range(4)] == [[], [1], [1, 3], [3, 5]]
    assert trace.stored() == [1, 3, 5] and trace.evicted() == [(1, 3)]
    assert held(trace) == [[1, 1, 3], [3, 2, None], [5, 3, None]]
    to_3 = torch.tensor([0, 0, 0, 0, 0.2, 0.2, 0.1, 0.1])
    torch.testing.assert_close(trace.attention_to(3), to_3)
    data = layer_data(trace)
    assert data["score"][:2] == [1.0, 6.0] and data["score"][7] is None
    assert data["rank"] == [1, 4, 0, 5, 2, 6, 3, 7]
    assert data["looked"][4] == [[1, 0.1], [3, 0.2]] and data["looked"][0] == []


def test_watching_changes_nothing_and_leaves_nothing():
    model = tiny()
    ids = sequence(2)
    with torch.no_grad():
        before = model(ids).logits
        memory_trace(model, ids)
        assert torch.equal(before, model(ids).logits)
    assert all(not b.attention.watchers for b in model.modules() if isinstance(b, BMojo))


def test_watchers_go_away_when_reading_fails():
    model = tiny(selection="oracle")
    with pytest.raises(ValueError, match="memory_scores"):
        memory_trace(model, sequence())
    assert all(not b.attention.watchers for b in model.modules() if isinstance(b, BMojo))
    scores = torch.arange(LENGTH, dtype=torch.float)[None]
    last = memory_trace(model, sequence(), scores)[0].remembered()
    assert last == [13, 14, 15]  # the last chunk begins at 16


def test_a_model_without_memory_is_refused():
    model = BMojoForCausalLM(BMojoConfig.mamba(vocab_size=8, hidden_size=8, num_layers=1))
    with pytest.raises(ValueError, match="no 'bmojo' sublayer"):
        memory_trace(model, torch.zeros(1, 5, dtype=torch.long))


# -- pictures -------------------------------------------------------------------------------------


def test_timeline_draws_a_bar_for_every_chunk_of_every_stored_token():
    _, ax = plt.subplots()
    timeline(ax, trace_by_hand())
    bars = [tuple(map(tuple, line.get_xydata())) for line in ax.lines if len(line.get_xdata())]
    expected = [((2, 1), (4, 1)), ((4, 1), (6, 1)), ((4, 3), (6, 3)), ((6, 3), (8, 3))]
    assert sorted(bars) == sorted([*expected, ((6, 5), (8, 5))])
    assert ax.get_xlabel() and ax.get_ylabel() and ax.get_xlim() == (0, 8)
    plt.close("all")


def test_text_heat_boxes_stored_tokens_and_shades_by_rank():
    _, ax = plt.subplots()
    tokens = list("ab\ncdefg")
    text_heat(ax, tokens, trace_by_hand().score[0].numpy(), [1, 3, 5], columns=3)
    # lines: ab↵ | cde | fg
    assert sorted(box.get_xy() for box in ax.patches) == [(-0.5, 0.5), (0.5, -0.5), (1.5, 0.5)]
    shade = ax.images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(shade[0], np.array([1, 4, 0]) / 7)
    np.testing.assert_allclose(shade[2], [3 / 7, 1, np.nan])
    assert [t.get_text() for t in ax.texts] == list("ab↵cdefg")
    plt.close("all")


def test_attention_shares_stack_up_to_one():
    _, ax = plt.subplots()
    trace = memory_trace(tiny(), sequence())[0]
    attention_shares(ax, trace)
    assert len(ax.collections) == 3
    for area, top in zip(ax.collections, trace.mass[0].cumsum(-1).T, strict=True):
        vertices = area.get_paths()[0].vertices
        for t in (0, 10, LENGTH - 1):
            assert np.isclose(vertices[vertices[:, 0] == t, 1].max(), float(top[t]), atol=1e-6)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["window", "fading", "eidetic"]
    plt.close("all")


# -- the page -------------------------------------------------------------------------------------

NASTY = [
    "</script>",
    "<!--",
    "<script>",
    "&lt;",
    '"',
    "'",
    "\\",
    "\n",
    "\t",
    "",
    "\u2028",
    "é",
    "@DATA@",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(path, traces, tokens) of a page whose tokens try to break out of it."""
    model, ids = tiny(), sequence()
    tokens = NASTY + [f"t{i}" for i in range(len(NASTY), LENGTH)]
    path = tmp_path_factory.mktemp("page") / "memory.html"
    assert memory_page(model, ids, tokens, path) == path
    assert memory_page(model, ids[0], tokens, str(path)) == path
    return path, memory_trace(model, ids), tokens


def embedded(text):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*)</script>', text)[1]
    )


def test_the_page_holds_the_traces(page):
    path, traces, tokens = page
    data = embedded(path.read_text(encoding="utf-8"))
    assert data["tokens"] == tokens
    assert [layer["layer"] for layer in data["layers"]] == [t.layer for t in traces]
    for layer, trace in zip(data["layers"], traces, strict=True):
        np.testing.assert_allclose(layer["score"], trace.score[0].numpy(), rtol=1e-3)
        np.testing.assert_allclose(layer["mass"], trace.mass[0].numpy(), atol=6e-5)
        assert layer["held"] == held(trace) and layer["chunk"] == 4 and layer["window"] == 4
        for position in trace.stored():
            shares = [dict(map(tuple, pairs)).get(position, 0) for pairs in layer["looked"]]
            np.testing.assert_allclose(shares, trace.attention_to(position).numpy(), atol=6e-5)


def test_the_page_is_whole_and_asks_nothing_of_others(page):
    text = page[0].read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2 and "<!--" not in text
    assert not re.search(r"(https?:)?//[a-z]|src=|@import|url\(|<link", text)
    assert "default-src 'none'" in text
    assert [p.name for p in page[0].parent.iterdir()] == ["memory.html"]


def test_json_cannot_end_its_element():
    text = embeddable_json({"a": ["</script>", "]]>", "<!--", "&", "\u2029", "\ud800"]})
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text)["a"][:2] == ["</script>", "]]>"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        embeddable_json(float("nan"))


def test_a_page_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "memory.html"
    path.write_text("old")
    tokens = [str(i) for i in range(LENGTH)]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        memory_page(tiny(), sequence(), tokens, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        memory_page(tiny(), sequence(), tokens, tmp_path / "absent" / "memory.html")


def test_wrong_tokens_are_refused(tmp_path):
    for ids, tokens, says in (
        (sequence(2), ["a"] * LENGTH, "one sequence"),
        (sequence(), ["a"] * 3, "19 strings, got 3"),
        (sequence(), "a" * LENGTH, "sequence of 19 strings"),
    ):
        with pytest.raises(ValueError, match=says):
            memory_page(tiny(), ids, tokens, tmp_path / "memory.html")
    assert not list(tmp_path.iterdir())


# What a visitor sees: all tokens as text, then what is told about one of them in the second layer.
VISIT = """(async () => {
  const buttons = () => [...document.querySelectorAll("#text button")];
  const words = buttons().map(b => b.textContent);
  document.querySelectorAll("#layers button")[1].click();
  buttons()[%d].click();
  const said = id => document.getElementById(id)?.textContent ?? null;
  const seen = {
    words, scripts: document.scripts.length, score: said("score"), life: said("life"),
    queries: [...document.querySelectorAll("#queries tr")].length - 1, mass: said("mass"),
    stored: buttons().flatMap((b, i) => b.classList.contains("stored") ? [i] : []),
    looked: buttons().flatMap((b, i) => b.classList.contains("looked") ? [i] : []),
  };
  document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  seen.next = buttons().findIndex(b => b.classList.contains("chosen"));
  return seen;
})()"""


def test_the_page_in_a_browser(page, tmp_path):
    """Click a token that was evicted: its life, its queries and its highlights are the trace's."""
    if browser.executable() is None:
        pytest.skip("no chromium on PATH")
    path, traces, tokens = page
    trace = traces[1]
    position, first, gone = next(life for life in held(trace) if life[2] is not None)
    with browser.open_browser(tmp_path / "profile") as window:
        seen = window.visit(path.as_uri(), VISIT % position)
    assert seen.complaints == [] and seen.requests == [path.as_uri()]
    shown = {"\n": "↵", "\t": "→", "": "∅"}
    assert seen.value["words"] == [shown.get(token, token) for token in tokens]
    assert seen.value["scripts"] == 2
    assert seen.value["stored"] == trace.stored()
    share = trace.attention_to(position)
    assert seen.value["looked"] == (share >= 0.01).nonzero().flatten().tolist()
    assert seen.value["queries"] == min(12, int((share >= 5e-5).sum()))
    chunk = trace.chunk
    assert f"from position {first * chunk} on" in seen.value["life"]
    assert f"evicted before position {gone * chunk}" in seen.value["life"]
    place = 1 + int((trace.score[0] > trace.score[0, position]).sum())
    assert f"number {place} of {LENGTH}" in seen.value["score"]
    window_share = float(trace.mass[0, position, 0])
    assert (
        abs(float(re.search(r"window ([\d.]+) %", seen.value["mass"])[1]) / 100 - window_share)
        < 1e-3
    )
    assert seen.value["next"] == position + 1
