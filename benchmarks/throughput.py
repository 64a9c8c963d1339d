"""Whole models on a GPU: forward and training step of the five kinds at equal parameters.

Every row is 16 384 tokens, cut into sequences of the given length, in bfloat16 without
torch.compile: median milliseconds of a forward pass and of forward + backward (no optimiser: it is
the same for all).  The yardstick in the same process is transformers' Mistral with torch's fused
attention, with as many parameters.  The order of lengths is chosen so that a run cut short by
``--seconds`` still compares kinds with each other.

    python benchmarks/throughput.py --out results/throughput.json
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.training import provenance, write_json

TOKENS = 16_384
KINDS = ("bmojo", "bmojo_f", "hybrid", "mamba", "transformer", "mistral")


def build(kind: str, preset: str, device: str) -> torch.nn.Module:
    """A model with random weights in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            if kind == "mistral":
                return MistralForCausalLM(_mistral(preset))
            return BMojoForCausalLM(BMojoConfig.preset(preset, kind))
    finally:
        torch.set_default_dtype(torch.float32)


def _mistral(preset: str) -> MistralConfig:
    """Mistral's layers in the sizes of our Transformer of that name: full attention, rotary."""
    ours = BMojoConfig.preset(preset, "transformer")
    return MistralConfig(
        vocab_size=ours.vocab_size, hidden_size=ours.hidden_size,
        num_hidden_layers=ours.num_layers, num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads, intermediate_size=ours.intermediate_size,
        sliding_window=None, tie_word_embeddings=True, attn_implementation="sdpa",
        use_cache=False,
    )  # fmt: skip


def measure(model: torch.nn.Module, length: int, tokens: int, repeats: int = 5) -> dict[str, Any]:
    """Median ms of forward and of forward + backward, and the peak memory of the latter."""
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
    model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    both_ms = _median_ms(training_step, repeats, device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"forward_ms": forward_ms, "forward_backward_ms": both_ms, "peak_gib": peak}


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
    arguments = parser.parse_args()
    begun, rows = time.perf_counter(), []
    for preset in arguments.presets:
        for kind in KINDS:
            if time.perf_counter() - begun > arguments.seconds:
                break
            model = build(kind, preset, arguments.device)
            count = sum(p.numel() for p in model.parameters())
            for length in arguments.lengths:
                row = {"preset": preset, "kind": kind, "parameters": count, "length": length}
                row |= measure(model, length, max(arguments.tokens, length))
                rows.append(row)
                print(row, flush=True)
                record = {"tokens": arguments.tokens, "rows": rows, **provenance()}
                write_json(Path(arguments.out), record)
            del model
            gc.collect()
            if arguments.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
