"""Whole models on a GPU: forward and training step of the five kinds at equal parameters.

Every row is 16 384 tokens, cut into sequences of the given length, in bfloat16 without
torch.compile: median milliseconds of a forward pass and of forward + backward (no optimiser: it is
the same for all).  The yardstick in the same process is transformers' Mistral with torch's fused
attention, with as many parameters.  The order of lengths is chosen so that a run cut short by
``--seconds`` still compares kinds with each other.

    python benchmarks/throughput.py --out results/throughput.json
    python benchmarks/throughput.py --presets 3b --no-backward --lengths 2048 8192 32768
    python benchmarks/throughput.py --presets 1.4b --kv-heads 4 --out grouped.json

    python benchmarks/throughput.py --fading selective scalar_decay --out fading.json

A row that fails (out of memory, a kernel) holds its ``error``, and the next go on.
``against_bars`` in the record holds B'MOJO's times over the Transformer's and the bars for them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.training import provenance, write_json

TOKENS = 16_384
WITHOUT_SSM = ("transformer", "mistral")
FADINGS = ("selective", "scalar_decay")
KINDS = ("bmojo", "bmojo_f", "hybrid", "mamba", "transformer", "mistral")
# Forward and backward of B'MOJO over our Transformer's of equal size, by context length.
BARS = {2048: 1.25, 8192: 1.0, 32768: 0.5}


def build(kind: str, preset: str, device: str, **changes: Any) -> torch.nn.Module:
    """A model with random weights in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            if kind == "mistral":
                return MistralForCausalLM(_mistral(preset, **changes))
            return BMojoForCausalLM(BMojoConfig.preset(preset, kind, **changes))
    finally:
        torch.set_default_dtype(torch.float32)


def _mistral(preset: str, **changes: Any) -> MistralConfig:
    """Mistral's layers in the sizes of our Transformer of that name: full attention, rotary."""
    ours = BMojoConfig.preset(preset, "transformer", **changes)
    return MistralConfig(
        vocab_size=ours.vocab_size, hidden_size=ours.hidden_size,
        num_hidden_layers=ours.num_layers, num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads, intermediate_size=ours.intermediate_size,
        sliding_window=None, tie_word_embeddings=True, attn_implementation="sdpa",
        use_cache=False,
    )  # fmt: skip


def measure(
    model: torch.nn.Module, length: int, tokens: int, repeats: int = 5, backward: bool = True
) -> dict[str, Any]:
    """Median ms of forward and, where asked, of forward + backward with its peak memory."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (tokens // length, length), generator=generator,
                        device=device)  # fmt: skip

    def forward() -> torch.Tensor:
        return model(ids, use_cache=False, logits_to_keep=1).logits

    def training_step() -> None:
        forward().float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    model.eval()
    with torch.no_grad():
        forward_ms = _median_ms(forward, repeats, device)
    if not backward:
        return {"forward_ms": forward_ms}
    model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    both_ms = _median_ms(training_step, repeats, device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"forward_ms": forward_ms, "forward_backward_ms": both_ms, "peak_gib": peak}


def against_bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """B'MOJO over the Transformer and the Mamba stack, row by row, and the bar where there is one.

    Forward and backward where it was timed, else forward.
    """
    by = {
        (r["preset"], r["kind"], r["length"], _fading(r["kind"], r.get("fading", FADINGS[0]))): r
        for r in rows
        if "error" not in r
    }
    found = []
    for (preset, kind, length, fading), ours in by.items():
        if kind != "bmojo":
            continue
        column = "forward_backward_ms" if "forward_backward_ms" in ours else "forward_ms"
        entry: dict[str, Any] = {"preset": preset, "length": length, "column": column}
        entry |= {} if fading == FADINGS[0] else {"fading": fading}
        for peer in ("transformer", "mistral", "mamba", "hybrid", "bmojo_f"):
            theirs = by.get((preset, peer, length, _fading(peer, fading)))
            if theirs is not None and column in theirs:
                entry[f"over_{peer}"] = round(ours[column] / theirs[column], 3)
        bar = BARS.get(length)
        if preset == "1.4b" and bar is not None and "over_transformer" in entry:
            entry |= {"bar": bar, "met": entry["over_transformer"] <= bar}
        found.append(entry)
    return found


def _fading(kind: str, fading: str) -> str | None:
    return None if kind in WITHOUT_SSM else fading


def _median_ms(work, repeats: int, device: torch.device) -> float:
    times = []
    for i in range(repeats + 2):
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        if i >= 2:
            times.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(times), 3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure what the time allows and write one record after each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/throughput.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--presets", nargs="+", default=["1.4b", "130m"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 16384])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--kv-heads", type=int, help="key-value heads, for attention in groups")
    parser.add_argument("--fading", nargs="+", choices=FADINGS, default=["selective"])
    parser.add_argument("--no-backward", action="store_true", help="forward only, for large models")
    arguments = parser.parse_args()
    begun, rows = time.perf_counter(), []
    changes = {} if arguments.kv_heads is None else {"num_kv_heads": arguments.kv_heads}
    for preset, kind, fading in product(arguments.presets, arguments.kinds, arguments.fading):
        if kind in WITHOUT_SSM and fading != arguments.fading[0]:
            continue  # the same model
        if time.perf_counter() - begun > arguments.seconds:
            break
        model = build(kind, preset, arguments.device, fading=fading, **changes)
        count = sum(p.numel() for p in model.parameters())
        for length in arguments.lengths:
            row = {"preset": preset, "kind": kind, "parameters": count, "length": length}
            tokens = max(arguments.tokens, length)
            row |= {"tokens": tokens, "num_kv_heads": model.config.num_key_value_heads}
            row |= {} if kind in WITHOUT_SSM else {"fading": fading}
            row |= _measured(model, length, tokens, backward=not arguments.no_backward)
            rows.append(row)
            print(row, flush=True)
            record = {"tokens": arguments.tokens, "rows": rows, **provenance()}
            record["against_bars"] = against_bars(rows)
            write_json(Path(arguments.out), record)
        del model
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


def _measured(model: torch.nn.Module, length: int, tokens: int, backward: bool) -> dict[str, Any]:
    """What ``measure`` says or, where it fails, the error: other rows are not lost with it."""
    try:
        return measure(model, length, tokens, backward=backward)
    except Exception as error:
        model.zero_grad(set_to_none=True)
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


if __name__ == "__main__":
    main()
