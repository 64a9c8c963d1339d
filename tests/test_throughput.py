"""The benchmark of whole models runs, at a size where nothing is learned from its times."""

import json
import sys

import pytest

from benchmarks import throughput


def test_every_kind_is_timed(tmp_path, monkeypatch):
    out = tmp_path / "t.json"
    arguments = ["--device", "cpu", "--presets", "tiny", "--lengths", "32", "64", "--tokens", "64"]
    monkeypatch.setattr(
        sys, "argv", ["throughput", *arguments, "--kv-heads", "1", "--out", str(out)]
    )
    throughput.main()
    record = json.loads(out.read_text())
    assert {(r["kind"], r["length"]) for r in record["rows"]} == {
        (kind, length) for kind in throughput.KINDS for length in (32, 64)
    }
    for row in record["rows"]:
        assert row["num_kv_heads"] == 1 and row["tokens"] == 64
        assert row["forward_ms"] > 0 and row["forward_backward_ms"] > 0
    assert [entry["length"] for entry in record["against_bars"]] == [32, 64]


def test_forward_alone(tmp_path, monkeypatch):
    out = tmp_path / "t.json"
    arguments = ["--device", "cpu", "--presets", "tiny", "--lengths", "32", "--tokens", "32"]
    arguments += ["--kinds", "bmojo", "transformer", "--no-backward", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments])
    throughput.main()
    record = json.loads(out.read_text())
    assert all("forward_backward_ms" not in row for row in record["rows"])
    assert record["against_bars"][0]["column"] == "forward_ms"


def test_two_ways_to_fade_beside_each_other(tmp_path, monkeypatch):
    """One row a way and kind with an SSM; the Transformer has none and is the yardstick of both.

    A row that fails holds its error and takes no other with it.
    """
    out, measure = tmp_path / "t.json", throughput.measure

    def failing(model, *sizes, **options):
        if model.config.model_type == "bmojo" and model.config.kind == "hybrid":
            raise RuntimeError("out of memory")
        return measure(model, *sizes, **options)

    monkeypatch.setattr(throughput, "measure", failing)
    arguments = ["--device", "cpu", "--presets", "tiny", "--lengths", "32", "--tokens", "32"]
    arguments += ["--kinds", "bmojo", "hybrid", "transformer", "--out", str(out)]
    arguments += ["--fading", "selective", "scalar_decay"]
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments])
    throughput.main()
    record = json.loads(out.read_text())
    assert [(r["kind"], r.get("fading"), r.get("error")) for r in record["rows"]] == [
        ("bmojo", "selective", None), ("bmojo", "scalar_decay", None),
        ("hybrid", "selective", "RuntimeError: out of memory"),
        ("hybrid", "scalar_decay", "RuntimeError: out of memory"), ("transformer", None, None),
    ]  # fmt: skip
    bars = record["against_bars"]
    assert [entry.get("fading") for entry in bars] == [None, "scalar_decay"]
    assert all("over_transformer" in entry and "over_hybrid" not in entry for entry in bars)


@pytest.mark.parametrize(("time", "met"), [(100.0, True), (126.0, False)])
def test_bars(time, met):
    rows = [
        {"preset": "1.4b", "kind": kind, "length": 2048, "forward_backward_ms": ms, "forward_ms": 1}
        for kind, ms in (("bmojo", time), ("transformer", 100.0), ("mamba", 200.0))
    ]
    assert throughput.against_bars(rows) == [
        {"preset": "1.4b", "length": 2048, "column": "forward_backward_ms",
         "over_transformer": time / 100, "over_mamba": time / 200, "bar": 1.25, "met": met}
    ]  # fmt: skip


def test_a_peer_that_is_missing_costs_one_row(tmp_path, monkeypatch):
    out = tmp_path / "t.json"
    arguments = ["--device", "cpu", "--presets", "tiny", "--lengths", "32", "--tokens", "32"]
    arguments += ["--kinds", "mamba_ssm", "bmojo", "--no-backward", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments])
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # also where it is installed
    throughput.main()
    missing, ours = json.loads(out.read_text())["rows"]
    assert missing["kind"] == "mamba_ssm" and "mamba_ssm" in missing["error"]
    assert ours["kind"] == "bmojo" and ours["forward_ms"] > 0


@pytest.mark.parametrize(("time", "met"), [(840.0, True), (850.0, False)])
def test_growth_and_mamba_ssm(time, met):
    def row(kind, length, tokens, ms):
        return {"preset": "1.4b", "kind": kind, "length": length, "tokens": tokens,
                "forward_backward_ms": ms, "forward_ms": 1.0}  # fmt: skip

    rows = [row("bmojo", 8192, 16384, 400.0), row("bmojo", 32768, 32768, time)]
    rows.append(row("mamba_ssm", 32768, 32768, 1200.0))
    one, long, growth = throughput.against_bars(rows)
    assert "over_mamba_ssm" not in one
    assert long["over_mamba_ssm"] == round(time / 1200, 3)
    assert long["met_mamba_ssm"] == (long["over_mamba_ssm"] <= 0.7)
    assert growth == {"preset": "1.4b", "kind": "bmojo", "growth_8192_to_32768": time / 200,
                      "bar": 4.2, "met": met}  # fmt: skip
