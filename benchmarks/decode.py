"""Time of one decoded token against the length of the prompt: B'MOJO and transformers' Mistral.

    python benchmarks/decode.py [--tokens 100] [--output results/benchmark_decode.json]

Three things are timed in turn, in one process, so that a busy machine slows all of them alike:

- a step of the model after a prompt of n tokens, for every n;
- a step of a Mistral of the same width, depth and parameter count, whose keys and values grow with
  n (they are filled with random numbers: how long a step takes does not depend on their values);
- the floor: the matrix products that a step of B'MOJO cannot do without, one row at a time: every
  weight matrix once, and the products of attention with its w + m keys and values.

Reported are medians over the tokens, in wall-clock time and in the process's CPU time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from bmojo_core import BMojoConfig, BMojoForCausalLM

Step = Callable[[], object]


def read_prompts(model: BMojoForCausalLM, lengths: list[int], piece: int = 512) -> dict[int, Step]:
    """A step of the model after each of the prompts, which are beginnings of the longest."""
    tokens = torch.randint(model.config.vocab_size, (1, max(lengths)))
    steps, cache, read = {}, None, 0
    with tqdm(total=max(lengths), desc="prompt", unit="token") as bar:
        for n in sorted(lengths):
            while read < n:
                part = tokens[:, read : min(read + piece, n)]
                out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, read = out.past_key_values, read + part.shape[1]
                bar.update(part.shape[1])
            steps[n] = decoder(model, cache.fork())
    return steps


def decoder(model: nn.Module, cache) -> Step:
    """Greedy decoding from a state, one token a call."""
    token = torch.zeros(1, 1, dtype=torch.long)

    def step() -> None:
        nonlocal token
        out = model(token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)

    return step


def mistral(config: BMojoConfig) -> MistralForCausalLM:
    """transformers' Mistral with the sizes of the Transformer of the same preset."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
            tie_word_embeddings=True, sliding_window=None,
        )
    ).eval()  # fmt: skip


def filled_cache(config: BMojoConfig, length: int) -> DynamicCache:
    """Keys and values of ``length`` tokens in every layer, of random numbers."""
    cache = DynamicCache()
    for layer in range(config.num_layers):
        shape = (1, config.num_kv_heads, length, config.head_dim)
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def floor(model: BMojoForCausalLM) -> Step:
    """The matrix products of one step, and nothing else."""
    c = model.config
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    rows = [torch.randn(1, weight.shape[1]) for weight in weights]
    seen = c.window + c.num_fading_tokens + c.num_eidetic_tokens
    heads = (c.num_heads, seen, c.head_dim)
    keys = [torch.randn(heads) for _ in range(2 * c.num_layers)]
    query, share = torch.randn(c.num_heads, 1, c.head_dim), torch.randn(c.num_heads, 1, seen)

    def step() -> None:
        for weight, row in zip(weights, rows, strict=True):
            torch.nn.functional.linear(row, weight)
        for k, v in zip(keys[::2], keys[1::2], strict=True):
            query @ k.transpose(1, 2)
            share @ v

    return step


def in_turn(steps: dict[str, Step], tokens: int) -> dict[str, dict[str, float]]:
    """Median seconds of every step, in wall-clock and CPU time, taken in turn."""
    wall = {name: [] for name in steps}
    cpu = {name: [] for name in steps}
    for i in tqdm(range(tokens + 2), desc="decode", unit="token"):
        for name, step in steps.items():
            clocks = time.perf_counter(), time.process_time()
            step()
            if i >= 2:  # the first two warm up
                wall[name].append(time.perf_counter() - clocks[0])
                cpu[name].append(time.process_time() - clocks[1])
    return {
        name: {"wall_s": statistics.median(wall[name]), "cpu_s": statistics.median(cpu[name])}
        for name in steps
    }


@torch.no_grad()
def benchmark(preset: str, lengths: list[int], tokens: int, seed: int, threads: int) -> dict:
    """The record of one run."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    model = BMojoForCausalLM(BMojoConfig.preset(preset)).eval()
    transformer = BMojoConfig.preset(preset, "transformer")
    peer = mistral(transformer)
    steps = {"floor": floor(model)}
    for n, step in read_prompts(model, lengths).items():
        steps[f"bmojo {n}"] = step
        steps[f"mistral {n}"] = decoder(peer, filled_cache(transformer, n))
    seconds = in_turn(steps, tokens)
    first, last = min(lengths), max(lengths)

    def ratio(a: str, b: str) -> dict[str, float]:
        return {clock: seconds[a][clock] / seconds[b][clock] for clock in ("wall_s", "cpu_s")}

    return {
        "preset": preset, "lengths": lengths, "tokens": tokens, "seed": seed, "threads": threads,
        "parameters": {"bmojo": model.num_parameters(), "mistral": peer.num_parameters()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": platform.processor() or platform.machine(),
        "seconds_per_token": seconds,
        "bmojo_longest_over_shortest": ratio(f"bmojo {last}", f"bmojo {first}"),
        "mistral_longest_over_shortest": ratio(f"mistral {last}", f"mistral {first}"),
        "bmojo_over_floor": ratio(f"bmojo {last}", "floor"),
        "bmojo_over_mistral": {n: ratio(f"bmojo {n}", f"mistral {n}") for n in lengths},
    }  # fmt: skip


def main() -> None:
    """Run, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="130m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    record = benchmark(**arguments)
    print(f"{'':>16} {'ms a token':>12} {'CPU ms':>10}")
    for name, median in record["seconds_per_token"].items():
        print(f"{name:>16} {1e3 * median['wall_s']:12.1f} {1e3 * median['cpu_s']:10.1f}")
    for name in (
        "bmojo_longest_over_shortest",
        "mistral_longest_over_shortest",
        "bmojo_over_floor",
    ):
        print(f"{name}: {record[name]['wall_s']:.2f} (CPU time {record[name]['cpu_s']:.2f})")
    if output:
        output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
