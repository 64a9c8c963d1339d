"""The benchmark of decoding runs, at a size where nothing is learned from its times."""

import json
import sys

import pytest
import torch

from benchmarks import decode_gpu


def test_every_way_that_a_cpu_has(tmp_path, monkeypatch):
    out = tmp_path / "d.json"
    arguments = ["--device", "cpu", "--presets", "tiny", "--lengths", "40", "9", "--tokens", "1"]
    monkeypatch.setattr(
        sys, "argv", ["decode", *arguments, "--batches", "1", "2", "--out", str(out)]
    )
    monkeypatch.setattr(decode_gpu, "PIECE", 16)
    decode_gpu.main()
    record = json.loads(out.read_text())
    assert not [row for row in record["rows"] if "error" in row]
    got = {(r["kind"], r["way"], r["batch"], r["length"]) for r in record["rows"]}
    ways = {(kind, "eager") for kind in (*decode_gpu.KINDS, "mistral")} | {("mistral", "static")}
    assert got == {(*way, batch, n) for way in ways for batch in (1, 2) for n in (9, 40)}
    assert len(record["against_mistral"]) == 3 * 4
    # a state of constant size
    sizes = {
        (r["kind"], r["batch"], r["state_bytes"]) for r in record["rows"] if "state_bytes" in r
    }
    assert len(sizes) == 6


def test_an_error_costs_one_row():
    def fails():
        raise RuntimeError("no room")

    assert decode_gpu.timed(fails, 1, 1, "cpu") == {"error": "RuntimeError: no room"}


@pytest.mark.parametrize(("ours", "met"), [(301.0, True), (299.0, False)])
def test_best_against_best(ours, met):
    def row(kind, way, speed):
        return {"preset": "130m", "kind": kind, "batch": 1, "length": 32768, "way": way, "ms": 1.0,
                "tokens_per_second": speed}  # fmt: skip

    rows = [row("bmojo", "eager", 50.0), row("bmojo", "graph", ours)]
    rows += [row("mistral", way, s) for way, s in (("eager", 100.0), ("graph", 80.0))]
    rows += [row("mistral", "unmasked", 200.0)]
    assert decode_gpu.against_mistral(rows) == [
        {"preset": "130m", "kind": "bmojo", "batch": 1, "length": 32768,
         "over_best_of_transformers": ours / 100, "over_best_of_all": round(ours / 200, 3),
         "bar": 3.0, "met": met}
    ]  # fmt: skip


def test_an_unmasked_cache_that_is_full_gives_mistrals_own_logits():
    model = decode_gpu.build("mistral", "tiny", "cpu").eval()
    token = torch.ones(2, 1, dtype=torch.long)
    found = []
    for attention in ("sdpa", "sdpa_without_mask"):
        torch.manual_seed(0)
        with torch.no_grad():
            cache = decode_gpu.static_cache(model, 2, 11, "cpu", more=1)
            model.set_attn_implementation(attention)
            found.append(model(token, past_key_values=cache, use_cache=True).logits)
        assert cache.layers[0].cumulative_length == 12
    torch.testing.assert_close(*found)
