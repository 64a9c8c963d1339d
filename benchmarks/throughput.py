"""Whole models on a GPU: forward and training step of the five kinds at equal parameters.

Every row is 16 384 tokens, cut into sequences of the given length, in bfloat16 without
torch.compile: median milliseconds of a forward pass and of forward + backward (no optimiser: it is
the same for all).  The yardsticks in the same process are transformers' Mistral with torch's fused
attention and, where it is installed, mamba-ssm's stack, with as many parameters.  The order of
lengths is chosen so that a run cut short by ``--seconds`` still compares kinds with each other.

    python benchmarks/throughput.py --out results/throughput.json
    python benchmarks/throughput.py --presets 3b --no-backward --lengths 2048 8192 32768
    python benchmarks/throughput.py --presets 1.4b --kv-heads 4 --out grouped.json

    python benchmarks/throughput.py --fading selective scalar_decay --out fading.json
    python benchmarks/throughput.py --presets 130m --captured --out captured.json

With ``--captured`` the training step is a CUDA graph: small models without the host's time.

A row that fails (out of memory, a kernel) holds its ``error``, and the next go on.
``against_bars`` in the record holds B'MOJO's times over the others' and the bars for them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.training import provenance, write_json

TOKENS = 16_384
ONE_FADING = ("transformer", "mistral", "mamba_ssm")  # kinds that `--fading` does not change
FADINGS = ("selective", "scalar_decay")
KINDS = ("bmojo", "bmojo_f", "hybrid", "mamba", "transformer", "mistral")
# Forward and backward of B'MOJO over our Transformer's of equal size, by context length.
BARS = {2048: 1.25, 8192: 1.0, 32768: 0.5}
BAR_MAMBA_SSM = 0.7  # the same over mamba-ssm's stack, at every length
BAR_GROWTH = 4.2  # a sequence of 32768 over one of 8192


def build(kind: str, preset: str, device: str, **changes: Any) -> torch.nn.Module:
    """A model with random weights in bfloat16."""
    if kind == "mamba_ssm":
        return MambaStack(preset, device)
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


class MambaStack(nn.Module):
    """mamba-ssm's language model in the sizes of our Mamba stack of that name.

    Its fused norms, its scan and, where causal-conv1d is installed, its one fused block.
    """

    def __init__(self, preset: str, device: str) -> None:
        super().__init__()
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        ours = BMojoConfig.preset(preset, "mamba")
        ssm = dict(
            layer="Mamba1", d_state=ours.state_size, d_conv=ours.conv_kernel, dt_rank=ours.dt_rank,
            expand=ours.ssm_intermediate_size / ours.hidden_size,
        )  # fmt: skip
        config = MambaConfig(
            d_model=ours.hidden_size, n_layer=len(ours.layer_types), vocab_size=ours.vocab_size,
            ssm_cfg=ssm,
        )  # fmt: skip
        self.stack = MambaLMHeadModel(config, device=device, dtype=torch.bfloat16)
        self.config = SimpleNamespace(vocab_size=ours.vocab_size, num_key_value_heads=None)

    def forward(self, ids: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        """Logits of the last columns."""
        return self.stack(ids, num_last_tokens=logits_to_keep)


def measure(
    model: torch.nn.Module, length: int, tokens: int, repeats: int = 5, backward: bool = True,
    captured: bool = False,
) -> dict[str, Any]:  # fmt: skip
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
    step = replayed(training_step) if captured else training_step
    both_ms = _median_ms(step, repeats, device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"forward_ms": forward_ms, "forward_backward_ms": both_ms, "peak_gib": peak}


def replayed(work: Callable[[], None]) -> Callable[[], None]:
    """The work as a CUDA graph, captured after it has run on a stream of its own."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def against_bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """B'MOJO over the other kinds, row by row, and the bar where there is one; then its growth.

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
        for peer in ("transformer", "mistral", "mamba_ssm", "mamba", "hybrid", "bmojo_f"):
            theirs = by.get((preset, peer, length, _fading(peer, fading)))
            if theirs is not None and column in theirs:
                entry[f"over_{peer}"] = round(ours[column] / theirs[column], 3)
        bar = BARS.get(length)
        if preset == "1.4b" and bar is not None and "over_transformer" in entry:
            entry |= {"bar": bar, "met": entry["over_transformer"] <= bar}
        if preset == "1.4b" and "over_mamba_ssm" in entry:
            met = entry["over_mamba_ssm"] <= BAR_MAMBA_SSM
            entry |= {"bar_mamba_ssm": BAR_MAMBA_SSM, "met_mamba_ssm": met}
        found.append(entry)
    return found + _growth(by)


def _growth(by: dict[tuple, dict[str, Any]]) -> list[dict[str, Any]]:
    """Time of a training step for one sequence of 32768 tokens over that for one of 8192."""
    found = []
    for (preset, kind, length, fading), long in by.items():
        short = by.get((preset, kind, 8192, fading))
        if kind != "bmojo" or length != 32768 or short is None:
            continue
        if "forward_backward_ms" not in long or "forward_backward_ms" not in short:
            continue
        one = [r["forward_backward_ms"] * r["length"] / r["tokens"] for r in (long, short)]
        growth = round(one[0] / one[1], 3)
        entry = {"preset": preset, "kind": kind, "growth_8192_to_32768": growth}
        entry |= {} if fading == FADINGS[0] else {"fading": fading}
        found.append(entry | {"bar": BAR_GROWTH, "met": growth <= BAR_GROWTH})
    return found


def _fading(kind: str, fading: str) -> str | None:
    return None if kind in ONE_FADING else fading


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
    here = importlib.util.find_spec("mamba_ssm") is not None
    kinds = [*KINDS, "mamba_ssm"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds if here else list(KINDS))
    parser.add_argument("--kv-heads", type=int, help="key-value heads, for attention in groups")
    parser.add_argument("--fading", nargs="+", choices=FADINGS, default=["selective"])
    parser.add_argument("--no-backward", action="store_true", help="forward only, for large models")
    parser.add_argument("--captured", action="store_true", help="training steps as CUDA graphs")
    arguments = parser.parse_args()
    begun, rows = time.perf_counter(), []
    changes = {} if arguments.kv_heads is None else {"num_kv_heads": arguments.kv_heads}
    for preset, kind, fading in product(arguments.presets, arguments.kinds, arguments.fading):
        if kind in ONE_FADING and fading != arguments.fading[0]:
            continue  # the same model
        if time.perf_counter() - begun > arguments.seconds:
            break
        try:
            model = build(kind, preset, arguments.device, fading=fading, **changes)
        except Exception as error:
            rows.append({"preset": preset, "kind": kind, "length": None, **_failure(error)})
            _write(arguments, rows)
            continue
        count = sum(p.numel() for p in model.parameters())
        for length in arguments.lengths:
            row = {"preset": preset, "kind": kind, "parameters": count, "length": length}
            tokens = max(arguments.tokens, length)
            row |= {"tokens": tokens, "num_kv_heads": model.config.num_key_value_heads}
            row |= {} if kind in ONE_FADING else {"fading": fading}
            how = dict(backward=not arguments.no_backward, captured=arguments.captured)
            row |= _measured(model, length, tokens, **how)
            rows.append(row)
            _write(arguments, rows)
        del model
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


def _measured(model: torch.nn.Module, length: int, tokens: int, **how: bool) -> dict[str, Any]:
    """What ``measure`` says or, where it fails, the error: other rows are not lost with it."""
    try:
        return measure(model, length, tokens, **how)
    except Exception as error:
        model.zero_grad(set_to_none=True)
        return _failure(error)


def _failure(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {error}"[:2000]}


def _write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The record so far: a run that is stopped keeps it."""
    print(rows[-1], flush=True)
    record = {"tokens": arguments.tokens, "captured": arguments.captured, "rows": rows}
    record |= provenance()
    record["against_bars"] = against_bars(rows)
    write_json(Path(arguments.out), record)


if __name__ == "__main__":
    main()
