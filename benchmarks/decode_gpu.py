"""Tokens per second of decoding on a GPU: B'MOJO, hybrid and Mamba against transformers' Mistral.

    python -m benchmarks.decode_gpu --out results/decode_gpu.json
    python -m benchmarks.decode_gpu --presets 130m --kinds bmojo --lengths 32768 --batches 1 32

Greedy decoding in bfloat16 after a prompt of n tokens, each model in every way it can be run:

    eager     the model's own step; Mistral with its cache that grows (DynamicCache)
    static    Mistral with keys and values in place (StaticCache)
    graph     the step recorded as a CUDA graph: `DecodeGraph`; Mistral on its StaticCache
    unmasked  Mistral's graph without the mask of the StaticCache, which keeps torch from its flash
              kernel: its full length is attended to, as if all of it were written

Ours read a prompt of random tokens, in pieces.  Mistral's keys and values are drawn at random: how
long a step takes does not depend on them.  Where they do not fit, the batch is halved until they
do, for ours as well, and the row says what was asked.  ``against_mistral`` compares the best way of
each; at 32768 tokens at least three times as many tokens per second are wanted.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, MistralForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.throughput import build
from bmojo_core import BMojoCache, BMojoConfig, BMojoForCausalLM, DecodeGraph
from bmojo_core.training import provenance, write_json

KINDS = ("bmojo", "hybrid", "mamba")
BAR, BAR_LENGTH = 3.0, 32768
PIECE = 16384  # tokens of a prompt that all rows together read at once
SHARE = 0.85  # of the device's memory that keys and values may take
Next = Callable[[Tensor], Tensor]  # token (b, 1) -> logits (b, 1, v)
Row = dict[str, Any]

AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)  # no mask is made for it


def milliseconds(step: Next, batch: int, tokens: int, device: str, repeats: int = 3) -> float:
    """Median over the repeats of the mean time of a token, chosen greedily."""
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    times = []
    for i in range(repeats + 1):
        _wait(device)
        begun = time.perf_counter()
        for _ in range(tokens if i else 3):  # the first round warms up
            token.copy_(step(token)[:, -1:].argmax(-1))
        _wait(device)
        times.append(1000 * (time.perf_counter() - begun) / tokens)
    return round(statistics.median(times[1:]), 4)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# -- ours -----------------------------------------------------------------------------------------


def prompts(
    model: BMojoForCausalLM, batch: int, lengths: list[int], device: str
) -> Iterator[tuple[int, BMojoCache]]:
    """The state after each length of one random text, read in pieces."""
    cache, read, piece = None, 0, max(1, PIECE // batch)
    for n in sorted(lengths):
        while read < n:
            part = torch.randint(model.config.vocab_size, (batch, min(piece, n - read)),
                                 device=device)  # fmt: skip
            out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, read = out.past_key_values, read + part.shape[1]
        yield n, cache


def our_ways(model: BMojoForCausalLM, cache: BMojoCache, device: str) -> dict[str, Any]:
    """Name of each way and what makes its step."""

    def eager() -> Next:
        own = cache.map(torch.clone)
        return lambda token: model(token, past_key_values=own, use_cache=True).logits

    ways = {"eager": eager}
    return ways | ({"graph": lambda: DecodeGraph(model, cache)} if device == "cuda" else {})


# -- Mistral --------------------------------------------------------------------------------------


def mistral_ways(model: MistralForCausalLM, batch: int, n: int, device: str) -> dict[str, Any]:
    """The same for Mistral after n tokens."""

    def on(cache: Any, attention: str = "sdpa") -> Next:
        model.set_attn_implementation(attention)
        return lambda token: model(token, past_key_values=cache, use_cache=True).logits

    def recorded(attention: str) -> Next:
        step = on(static_cache(model, batch, n, device), attention)
        return record(step, batch, device)

    ways = {
        "eager": lambda: on(growing_cache(model, batch, n, device)),
        "static": lambda: on(static_cache(model, batch, n, device)),
    }
    if device == "cuda":
        ways["graph"] = lambda: recorded("sdpa")
        ways["unmasked"] = lambda: recorded("sdpa_without_mask")
    return ways


def _drawn(model: MistralForCausalLM, batch: int, n: int, device: str) -> Tensor:
    c = model.config
    width = c.hidden_size // c.num_attention_heads
    shape = batch, c.num_key_value_heads, n, width
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def growing_cache(model: MistralForCausalLM, batch: int, n: int, device: str) -> DynamicCache:
    """Keys and values of n tokens in every layer."""
    cache = DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        cache.update(*(_drawn(model, batch, n, device) for _ in "kv"), layer)
    return cache


def static_cache(
    model: MistralForCausalLM, batch: int, n: int, device: str, more: int = 256
) -> StaticCache:
    """The same with room for ``more`` tokens."""
    cache = StaticCache(config=model.config, max_cache_len=n + more)
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    model(token, past_key_values=cache, use_cache=True)  # makes its tensors
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(n)
    return cache


def record(step: Next, batch: int, device: str) -> Next:
    """The step as a CUDA graph."""
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(token)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(token)

    def replay(given: Tensor) -> Tensor:
        token.copy_(given)
        graph.replay()
        return logits

    return replay


def batch_that_fits(preset: str, batch: int, n: int, device: str) -> int:
    """The batch, halved until Mistral's keys and values of n tokens fit into the device."""
    if device != "cuda":
        return batch
    c = BMojoConfig.preset(preset, "transformer")
    one = 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim * n
    room = SHARE * torch.cuda.get_device_properties(0).total_memory
    while batch > 1 and batch * one > room:
        batch //= 2
    return batch


# -- the record -----------------------------------------------------------------------------------


def timed(make: Callable[[], Next], batch: int, tokens: int, device: str) -> Row:
    """Milliseconds and tokens per second of a way, or its error: other rows are kept."""
    try:
        ms = milliseconds(make(), batch, tokens, device)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"ms": ms, "tokens_per_second": round(1000 * batch / ms, 1)}


def against_mistral(rows: list[Row]) -> list[Row]:
    """Tokens per second of each of ours over Mistral's: best of each, and graph of each."""
    speed: dict[tuple, dict[str, float]] = {}
    for r in rows:
        if "ms" in r:
            case = r["preset"], r["kind"], r["batch"], r["length"]
            speed.setdefault(case, {})[r["way"]] = r["tokens_per_second"]
    found = []
    for (preset, kind, batch, length), ours in speed.items():
        theirs = speed.get((preset, "mistral", batch, length))
        if kind == "mistral" or theirs is None:
            continue
        entry: Row = {"preset": preset, "kind": kind, "batch": batch, "length": length}
        for name, ways in (("of_transformers", ("eager", "static", "graph")), ("of_all", theirs)):
            best = max((s for way, s in theirs.items() if way in ways), default=None)
            if best is not None:
                entry[f"over_best_{name}"] = round(max(ours.values()) / best, 3)
        if kind == "bmojo" and length == BAR_LENGTH and "over_best_of_transformers" in entry:
            entry |= {"bar": BAR, "met": entry["over_best_of_transformers"] >= BAR}
        found.append(entry)
    return found


def steps(arguments: argparse.Namespace) -> Iterator[tuple[Row, Callable[[], Next]]]:
    """Every row without its times, and what makes its step; models are built on the way."""
    first, *others = arguments.kinds
    for preset, kind in product(arguments.presets, (first, "mistral", *others)):
        head = {"preset": preset, "kind": kind}
        try:
            yield from steps_of(head, arguments)
        except Exception as error:  # in the model or its prompt
            yield head | {"batch": None, "length": None, "way": "prompt"}, _failing(error)
        gc.collect()


def steps_of(head: Row, arguments: argparse.Namespace) -> Iterator[tuple[Row, Callable[[], Next]]]:
    """The same for one model."""
    preset, kind, device = head["preset"], head["kind"], arguments.device
    model = build(kind, preset, device).eval()
    head = head | {"parameters": sum(p.numel() for p in model.parameters())}
    for asked in arguments.batches:
        fitting: dict[int, list[int]] = {}
        for n in sorted(arguments.lengths, reverse=True):
            fitting.setdefault(batch_that_fits(preset, asked, n, device), []).append(n)
        for batch, lengths in fitting.items():
            row = head | {"batch": batch} | ({"asked": asked} if batch != asked else {})
            if kind == "mistral":
                for n in lengths:
                    for way, make in mistral_ways(model, batch, n, device).items():
                        yield row | {"length": n, "way": way}, make
                continue
            for n, cache in prompts(model, batch, lengths, device):
                for way, make in our_ways(model, cache, device).items():
                    yield row | {"length": n, "way": way, "state_bytes": cache.nbytes}, make


def _failing(error: Exception) -> Callable[[], Next]:
    def make() -> Next:
        raise error

    return make


@torch.no_grad()
def main() -> None:
    """Measure what the time allows and write the record after each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/decode_gpu.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--presets", nargs="+", default=["130m", "370m"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--tokens", type=int, default=24, help="tokens a timing")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    begun, rows = time.perf_counter(), []
    for row, make in steps(arguments):
        if time.perf_counter() - begun > arguments.seconds:
            break
        rows.append(row | timed(make, row["batch"] or 1, arguments.tokens, arguments.device))
        rows[-1]["at_s"] = round(time.perf_counter() - begun, 1)
        print(rows[-1], flush=True)
        record = {"dtype": "bfloat16", "tokens": arguments.tokens, "rows": rows, **provenance()}
        write_json(Path(arguments.out), record | {"against_mistral": against_mistral(rows)})


if __name__ == "__main__":
    main()
