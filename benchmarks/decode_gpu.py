"""Tokens per second of decoding on a GPU, ours against transformers' Mistral, by context length.

    python benchmarks/decode_gpu.py [--preset 130m] [--contexts 2048 8192 32768] [--batches 1 32]

Both in bfloat16, one process, both ways of launching: step by step from Python, and captured in a
CUDA graph.  The fastest of each side makes the ratio.  Our state is made by a real prefill.  The
time of an attention step does not depend on the values of its keys, so Mistral's caches are filled
with random ones; captured it has transformers' static cache, uncaptured the dynamic one as well,
which needs no mask.  The mask of the static cache keeps torch from its flash kernel; what that
would take, were the cache always full, is `unmasked_ms`: not a way that transformers has, so it
stays out of the ratio and gets one of its own.  So does `compiled_ms`, the whole model under
`torch.compile`, captured: our graph is made of compiled sublayers, too.

Where Mistral's keys and values do not fit into the device, the batch is halved until they do, for
ours as well, and the row says what was `asked`.  A case that fails leaves its error.

Beside the time of a captured step stand its parts: a step cannot be faster than the host launches
it, nor than the device is busy with it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from throughput import _mistral
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, DynamicCache, MistralForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.decode_graph import WARM_UPS, DecodeGraph
from bmojo_core.training import provenance, write_json

BAR = 3.0
SHARE = 0.85  # of the device's memory that keys and values may take
STEPS, REPEATS = 32, 5
Step = Callable[[], object]

AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)  # no mask is made for it


def ours(kind: str, preset: str, batch: int, context: int) -> dict[str, float]:
    """ms a token of one of our kinds, from Python and captured."""
    with torch.device("cuda"):
        model = BMojoForCausalLM(BMojoConfig.preset(preset, kind)).to(torch.bfloat16).eval()
    generator = torch.Generator("cuda").manual_seed(0)
    vocabulary, cache, piece = model.config.vocab_size, None, max(512, 32768 // batch)
    for begun in range(0, context, piece):  # batches of long prompts in pieces that fit
        columns = min(piece, context - begun)
        ids = torch.randint(vocabulary, (batch, columns), generator=generator, device="cuda")
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
    token = ids[:, -1:]
    live = cache.map(torch.Tensor.clone)
    eager = milliseconds(lambda: model(token, past_key_values=live, use_cache=True))
    torch.cuda.set_sync_debug_mode("error")  # a step that asks the device something is refused
    try:
        model(token, past_key_values=live, use_cache=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = DecodeGraph(model, cache)
    return {"eager_ms": eager, "graph_ms": milliseconds(lambda: graph(token)),
            **split(lambda: graph(token)), "state_mib": cache.nbytes / 2**20,
            "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip


def mistral(preset: str, batch: int, context: int) -> dict[str, Any]:
    """ms a token of transformers' Mistral, full attention, its own caches."""
    with torch.device("cuda"):
        model = MistralForCausalLM(_mistral(preset)).to(torch.bfloat16).eval()
    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    found["eager_ms"] = milliseconds(_dynamic_step(model, token, context))
    free()
    step = _static_step(model, token, context)
    found["static_ms"] = milliseconds(step)
    replay = captured(step)
    found["graph_ms"] = milliseconds(replay)
    found |= split(replay)
    model.set_attn_implementation("sdpa_without_mask")
    found["unmasked_ms"] = milliseconds(captured(step))
    model.set_attn_implementation("sdpa")
    model.compile(dynamic=False)
    try:
        found["compiled_ms"] = milliseconds(captured(step))
    except Exception as error:  # whatever a compiler raises: the other times are not lost with it
        found["compiled_error"] = f"{type(error).__name__}: {error}"[:400]
    return found


def batch_that_fits(preset: str, batch: int, context: int, memory: int) -> int:
    """The batch, halved until Mistral's keys and values take no more than a share of the memory."""
    c = BMojoConfig.preset(preset, "transformer")
    row = 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim * context
    while batch > 1 and batch * row > SHARE * memory:
        batch //= 2
    return batch


def _keys(model: MistralForCausalLM, batch: int, context: int) -> torch.Tensor:
    c = model.config
    width = c.hidden_size // c.num_attention_heads
    shape = (batch, c.num_key_value_heads, context, width)
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _dynamic_step(model: MistralForCausalLM, token: torch.Tensor, context: int) -> Step:
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        k = _keys(model, len(token), context)
        cache.update(k, k, layer)

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)

    return step


def _static_step(model: MistralForCausalLM, token: torch.Tensor, context: int) -> Step:
    cache = StaticCache(config=model.config, max_cache_len=context + 1)
    at = torch.arange(context, device="cuda")
    for layer in range(model.config.num_hidden_layers):
        k = _keys(model, len(token), context)
        cache.update(k, k, layer, {"cache_position": at})
    here = torch.full((1,), context, dtype=torch.long, device="cuda")
    position = here.expand(len(token), 1)

    def step() -> None:
        for layer in cache.layers:  # the same place is written again and again
            if hasattr(layer, "cumulative_length"):
                _put(layer, context)
        model(token, past_key_values=cache, use_cache=True, logits_to_keep=1,
              cache_position=here, position_ids=position)  # fmt: skip

    return step


def _put(layer: Any, context: int) -> None:
    if isinstance(layer.cumulative_length, torch.Tensor):
        layer.cumulative_length.fill_(context)
    else:
        layer.cumulative_length = context


def captured(step: Step) -> Step:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(step: Step) -> float:
    """Median over repeats of the mean time of a run of steps."""
    times = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begun) / STEPS)
    return round(statistics.median(times[1:]), 4)


def split(step: Step) -> dict[str, float]:
    """Of a captured step: ms the host takes to launch it, ms the device is busy, its kernels."""
    torch.cuda.synchronize()
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - begun))
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in seen.events() if e.device_type.name == "CUDA"]
    busy = sum(e.device_time for e in kernels) / 1000
    return {"launch_ms": round(statistics.median(times), 4), "busy_ms": round(busy, 4),
            "kernels": len(kernels)}  # fmt: skip


def free() -> None:
    """Give memory back between cases."""
    gc.collect()
    torch.cuda.empty_cache()


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens per second of ours over Mistral's, the fastest way of each, and the bar."""
    ways = ("eager_ms", "static_ms", "graph_ms")
    fastest = {
        (r["kind"], r["batch"], r["context"]): min(r[way] for way in ways if way in r)
        for r in rows
        if any(way in r for way in ways)
    }
    mistrals = {(r["batch"], r["context"]): r for r in rows if r["kind"] == "mistral"}
    found = []
    for (kind, batch, context), ms in fastest.items():
        theirs = fastest.get(("mistral", batch, context))
        if kind == "mistral" or theirs is None:
            continue
        ratio = theirs / ms
        row = {"kind": kind, "batch": batch, "context": context, "over_mistral": round(ratio, 2)}
        if (kind, context) == ("bmojo", 32768):
            row |= {"bar": BAR, "met": ratio >= BAR}
        for way in ("unmasked", "compiled"):
            if f"{way}_ms" in mistrals[batch, context]:
                row[f"over_{way}"] = round(mistrals[batch, context][f"{way}_ms"] / ms, 2)
        found.append(row)
    return found


@torch.no_grad()
def main() -> None:
    """One row a kind, batch and context; the record is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="130m")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 8192, 2048])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--kinds", nargs="+", default=["bmojo", "mistral", "hybrid", "mamba"])
    parser.add_argument("--output", type=Path, default=Path("results/decode_gpu.json"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    memory = torch.cuda.get_device_properties(0).total_memory
    for context in arguments.contexts:
        for asked in arguments.batches:
            batch = batch_that_fits(arguments.preset, asked, context, memory)
            for kind in arguments.kinds:
                row = {"kind": kind, "batch": batch, "context": context}
                row |= {"asked": asked} if batch != asked else {}
                run = mistral if kind == "mistral" else lambda *a, k=kind: ours(k, *a)
                try:
                    row |= run(arguments.preset, batch, context)
                except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:400]
                free()
                rows.append(row)
                print(row, flush=True)
                record = {"preset": arguments.preset, "rows": rows, "ratios": compare(rows)}
                write_json(arguments.output, record | provenance())


if __name__ == "__main__":
    main()
