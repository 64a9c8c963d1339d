"""Write docs/measurements.md from the records in results/: no number there is typed by hand.

python benchmarks/report.py            # a test compares the page with what this would write
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "measurements.md"


def load(name: str) -> Any:
    """A record of results/."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def theory() -> str:
    """`realization` against its peers."""
    r = load("benchmark_realization")
    rows = [
        [f"ERA, order 20, Hankel {size}", "python-control", f"{v['times_faster']:.0f}", "4"]
        for size, v in r["hankel"]["hankel"].items()
    ]
    n4sid, likelihood = r["identification"], r["likelihood"]
    rows.append([n4sid["task"], "SIPPY", f"{n4sid['times_faster_median']:.1f}", "6"])
    rows.append(
        [likelihood["task"], "statsmodels", f"{likelihood['times_faster_median']:.1f}", "1.5"]
    )
    share = n4sid["markov_error_ratio_of_means"]
    return (
        "## Realization theory, one BLAS thread\n\n"
        + table(["task", "peer", "times faster", "asked for"], rows)
        + f"\n\nErrors: ERA's are below 1e-14 on both sides; N4SID's mean Markov error is "
        f"{share:.3f} of SIPPY's over {n4sid['systems']} systems; the likelihoods agree to "
        f"{likelihood['relative_difference']:.0e} relative."
    )


def laptop() -> str:
    """The scan and the decoding step on two cores."""
    scan, decode = load("benchmark_scan_cpu"), load("benchmark_decode")
    over = decode["bmojo_over_mistral"]
    return (
        "## On two CPU cores\n\n"
        f"The selective scan (b 64, l 256, d 128, n 16; forward and backward) is "
        f"{scan['times_faster']:.1f} times faster than mambapy's parallel scan (best of "
        f"{scan['ours']['runs']} against best of {scan['mambapy']['runs']}; medians: "
        f"{scan['times_faster_median']:.1f}) with {scan['peak_memory_ratio']:.3f} of its peak "
        f"memory. Asked for: 20 and 0.2.\n\n"
        f"Decoding with the 130m preset: the time of a token after 4096 tokens is "
        f"{decode['bmojo_longest_over_shortest']['cpu_s']:.2f} of that after 512 (Mistral of equal "
        f"size: {decode['mistral_longest_over_shortest']['cpu_s']:.2f}). It is "
        f"{decode['bmojo_over_floor']['cpu_s']:.2f} times the time of its matrix products alone; "
        f"1.5 was asked for. Against that Mistral it takes {over['512']['cpu_s']:.2f} of the time "
        f"at 512 tokens and {over['4096']['cpu_s']:.2f} at 4096."
    )


CARDS = ("benchmark_ops_h200", "benchmark_ops_h100")


def kernels() -> str:
    """Scans against mamba-ssm's, attention against torch's, convolutions against their bytes."""
    cards = [load(name) for name in CARDS]
    scans, filters, met = [], [], 0
    for card in cards:
        for s in card["scan"]:
            theirs = s["mamba_ssm"]
            ratio = {k: s[k] / theirs[k] for k in ("forward_ms", "forward_backward_ms", "peak_mib")}
            met += sum(ratio[k] <= 0.5 for k in ("forward_ms", "forward_backward_ms"))
            scans.append([
                short(card), str(tuple(s["shape"])), f"{s['forward_ms']:.2f}",
                f"{s['forward_backward_ms']:.2f}", *(f"{r:.2f}" for r in ratio.values()),
                f"{s['forward_ms'] / s['floors_ms']['one_pass_of_exponentials']:.1f}",
                f"{s['forward_ms'] / s['floors_ms']['forward_bytes']:.1f}",
            ])  # fmt: skip
        filters += [
            [short(card), str(tuple(c["shape"])), f"{c['forward_ms']:.3f}",
             f"{c['forward_over_floor']:.2f}", f"{c['forward_backward_over_floor']:.2f}"]
            for c in card["conv"]
        ]  # fmt: skip
    head = ["GPU", "(B, L, D), N = 16", "forward ms", "with backward", "forward / mamba-ssm",
            "with backward / mamba-ssm", "peak / mamba-ssm", "forward / exponentials",
            "forward / bytes"]  # fmt: skip
    return (
        "## Kernels on one GPU, bfloat16\n\nThe selective scan:\n\n"
        + table(head, scans)
        + f"\n\nHalf of mamba-ssm's time was asked for; {met} of the {2 * len(scans)} timings "
        "meet it. The last columns are the time over that of the exponentials alone and over that "
        "of reading and writing. What limits the forward kernel is the issue of instructions, not "
        "bytes and not exponentials (`scan_reading` in `results/benchmark_ops_gpu.json`, an "
        "earlier record).\n\n"
        + attention(cards) +
        "The short convolution; at most 1.3 times the time of its bytes was asked for. The times "
        "are those of its first kernels; they have been rewritten since and not been timed "
        "again:\n\n"
        + table(["GPU", "(B, L, D), 4 taps", "forward ms", "forward / bytes",
                 "with backward / bytes"], filters)
    )  # fmt: skip


def short(card: dict) -> str:
    """H100 or H200."""
    return card["device"].split()[1]


def attention(cards: list[dict]) -> str:
    """Memory attention against torch's FlexAttention and against two flash calls."""
    rows = []
    for card in cards:
        for a in card["attention"]:
            flex, merged = ("flex_forward_ms" in a), a["merged_flash_forward_ms"]
            both = "forward_backward_ms"
            rows.append([
                short(card), str(a["length"]), f"16 / {a['key_heads']}", str(a["memory_tokens"]),
                f"{a['forward_ms']:.2f}", f"{a[both]:.2f}",
                f"{a['forward_ms'] / a['flex_forward_ms']:.3f}" if flex else "-",
                f"{a[both] / a[f'flex_{both}']:.3f}" if flex else "-",
                f"{a['forward_ms'] / merged:.2f}",
            ])  # fmt: skip
    head = ["GPU", "length", "heads", "memory tokens", "forward ms", "with backward",
            "forward / Flex", "with backward / Flex", "forward / merged flash"]  # fmt: skip
    worst = max(float(r) for row in rows for r in row[6:8] if r != "-")
    innovations = cards[0]["innovation"]
    selected = max(i["innovation_ms"] + i["running_top_k_ms"] for i in innovations)
    return (
        "Attention over a window of 512 and the memory tokens of chunks of 512, heads of 128, "
        "against FlexAttention with as many visible keys (at most 1.15 was asked for; the most is "
        f"{worst:.3f}) and against two calls of flash attention merged by their log-sum-exp "
        "(0.8):\n\n"
        + table(head, rows)
        + f"\n\nInnovation and running top-k of {innovations[0]['length']} tokens take "
        f"{selected:.3f} ms together, forward ({short(cards[0])}).\n\n"
    )  # fmt: skip


STACKS = ("bmojo", "bmojo_f", "hybrid", "mamba", "transformer", "mistral", "mamba_ssm")


SCALES = {"1.4b": "1.4 billion", "790m": "790 million", "370m": "370 million",
          "130m": "130 million"}  # fmt: skip
ELSEWHERE = {
    "throughput_h100": "H100, 16384 tokens a step",
    "throughput_32k": "H100, 32768 tokens",
    "throughput_32k_again": "H100, 32768 tokens, another card, later",
    "throughput_grouped_32k": "the same, 4 key-value heads",
    "throughput_3b": "H100, 3b, forward only",
}


def models() -> str:
    """Whole models: all kinds and sizes on one machine, then the ratios of the other records."""
    record = load("throughput_h200")
    ours = steps_of(record, "1.4b")
    growth = 4 * ours["bmojo", 32768] / ours["bmojo", 8192]
    sizes = "\n\n".join(
        f"{words} parameters:\n\n{stacks(record, size)}\n\n{over(record, size)}"
        for size, words in SCALES.items()
    )
    return (
        f"## Whole models, one {record['device']}\n\n"
        "Milliseconds of forward / forward and backward, bfloat16, without `torch.compile`, "
        f"{record['tokens']} tokens a step, so that the longest is one sequence; then forward and "
        "backward of B'MOJO over theirs. `transformer` is this library's, with torch's fused "
        "attention; `mistral` is transformers' class in the same sizes, `mamba_ssm` that package's "
        f"own stack. A dash: not timed.\n\n{sizes}\n\n"
        "Asked for, of 1.4 billion: over `mamba_ssm` at most 0.7; over the Transformer at most "
        "1.25 at 2k, 1.0 at 8k and 0.5 at 32k; a sequence of 32768 tokens at most 4.2 times one of "
        f"8192 (it takes {growth:.2f}). All are met but that at 32k. The paper, on an A100, has "
        "B'MOJO ahead of a Transformer at 2k already; on this chip the crossing is near 7k "
        "(chapter 30 says why, and why the two smallest models cross later).\n\n"
        "B'MOJO over the Transformer in other records. In the third, the Transformer took a tenth "
        "longer at 2k than in the second, and flatters the ratio there:\n\n" + elsewhere()
    )  # fmt: skip


def stacks(record: dict, size: str) -> str:
    """One row a kind, one column a length."""
    by = {(r["kind"], r["length"]): r for r in record["rows"]
          if r["preset"] == size and "error" not in r}  # fmt: skip
    lengths = sorted({length for _, length in by})
    columns = ("forward_ms", "forward_backward_ms")
    rows = [
        [kind, *(" / ".join(f"{by[kind, n][c]:.0f}" for c in columns) if (kind, n) in by else "-"
                 for n in lengths)]
        for kind in STACKS if (kind, lengths[0]) in by or (kind, lengths[-1]) in by
    ]  # fmt: skip
    return table(["kind", *(f"length {n}" for n in lengths)], rows)


def steps_of(record: dict, size: str) -> dict[tuple[str, int], float]:
    """Forward and backward in ms, or forward where only that was timed, by kind and length."""
    return {
        (r["kind"], r["length"]): r.get("forward_backward_ms", r["forward_ms"])
        for r in record["rows"] if r["preset"] == size and "error" not in r
    }  # fmt: skip


def over(record: dict, size: str) -> str:
    """B'MOJO's training step over the other kinds', length by length."""
    ms = steps_of(record, size)
    lengths = sorted({length for _, length in ms})
    rows = [
        [peer, *(f"{ms['bmojo', n] / ms[peer, n]:.2f}" if (peer, n) in ms else "-"
                 for n in lengths)]
        for peer in STACKS[1:] if any((peer, n) in ms for n in lengths)
    ]  # fmt: skip
    return table(["B'MOJO over", *(f"length {n}" for n in lengths)], rows)


def elsewhere() -> str:
    """B'MOJO over the Transformer, one row a record."""
    lengths, rows = (2048, 8192, 16384, 32768), []
    for name, words in ELSEWHERE.items():
        ms = steps_of(load(name), "3b" if name == "throughput_3b" else "1.4b")
        ratio = {n: ms["bmojo", n] / ms["transformer", n] for n in lengths if ("bmojo", n) in ms}
        rows.append([words, *(f"{ratio[n]:.2f}" if n in ratio else "-" for n in lengths)])
    return table(["record", *(f"length {n}" for n in lengths)], rows)


KINDS = ("mamba", "hybrid", "bmojo_f", "bmojo", "transformer")


def decoding() -> str:
    """One token after a long context, on a GPU."""
    runs, larger = [load("decode_gpu"), load("decode_gpu_again")], load("decode_gpu_370m")
    rows, of_370m = [], larger["ratios"][0]
    for run, d in enumerate(runs, 1):
        by = {(r["kind"], r["batch"], r["context"]): r for r in d["rows"] if "error" not in r}
        for compared in d["ratios"]:
            kind, batch, context = (compared[name] for name in ("kind", "batch", "context"))
            ours, theirs = by[kind, batch, context], by["mistral", batch, context]
            uncaptured = min(theirs["eager_ms"], theirs["static_ms"])
            rows.append([
                str(run), str(context), str(batch), f"{ours['eager_ms']:.1f}",
                f"{ours['graph_ms']:.2f}", f"{uncaptured:.1f}", f"{theirs['graph_ms']:.2f}",
                f"{compared['over_mistral']:.2f}",
            ])  # fmt: skip
    head = ["run", "context", "batch", "step by step, ms", "as a graph", "Mistral step by step",
            "Mistral as a graph", "tokens per second over Mistral's"]  # fmt: skip
    bar = next(r for r in runs[0]["ratios"] if "bar" in r)
    unfused = load("decode_gpu_unfused")["ratios"]
    plain = {r["batch"]: r["over_mistral"] for r in unfused if r["context"] == bar["context"]}
    return (
        f"## Decoding on one {runs[0]['device']}, preset {runs[0]['preset']}, bfloat16\n\n"
        "Milliseconds of one token of every row, called step by step from Python and captured as a "
        "CUDA graph (`bmojo_core.DecodeGraph`). Mistral is transformers' class in the same size "
        "with full attention; step by step with the faster of its two caches. The last column "
        "compares the fastest way of each. `DecodeGraph` has `torch.compile` fuse small kernels "
        "before it captures; Mistral was captured as its library runs it. With neither compiled "
        f"the last column was {plain[1]} at batch 1 and {plain[32]} at batch 32 "
        "(`results/decode_gpu_unfused.json`).\n\n"
        + table(head, rows)
        + f"\n\n{bar['bar']:.0f} times was asked for at {bar['context']} tokens. The two runs are "
        "the same code on two machines of one kind. At batch 1 the tiles of a step are tried out "
        "on the machine where the graph is made, so that what is chosen may differ. "
        f"With preset {larger['preset']}, batch {of_370m['batch']} and {of_370m['context']} tokens "
        f"the last column is {of_370m['over_mistral']:.2f}."
    )


def with_seeds(runs: list[float]) -> str:
    """The mean, and in brackets how many runs it is of where they are fewer than three."""
    return f"{mean(runs):.2f}" + (f" ({len(runs)})" if len(runs) < 3 else "")


def repeated_rate(runs: list[dict], of: tuple[str, ...], pairs: str) -> dict[tuple, list[float]]:
    """By the tags ``of``: accuracies at the rate that was repeated, which is the best one."""
    groups: dict[tuple, dict] = defaultdict(lambda: defaultdict(list))
    for r in runs:
        tags = r["job"]["tags"]
        groups[tuple(tags[name] for name in of)][tags["lr"]].append(r["accuracy"][pairs])
    return {k: max(v.values(), key=lambda a: (len(a), mean(a))) for k, v in groups.items()}


def by_width(name: str) -> str:
    """One of the two records of figure 2 at 64 pairs."""
    runs = [r for r in load(name)["runs"] if "eidetic" not in r["job"]["tags"]]
    best = repeated_rate(runs, ("kind", "width"), "64")
    widths = sorted({width for _, width in best})
    rows = [[kind, *(with_seeds(best[kind, width]) for width in widths)] for kind in KINDS]
    return table(["kind", *map(str, widths)], rows)


def by_rule() -> str:
    """The selection rules at GPU size: mean, and range over seeds."""
    runs = [r for r in load("policies")["runs"] if r["job"]["tags"]["size"] == "gpu"]
    best = repeated_rate(runs, ("rule", "filler"), "64")
    cells = {k: f"{with_seeds(v)}, {min(v):.2f} to {max(v):.2f}" for k, v in best.items()}
    rules = sorted({rule for rule, _ in best}, key=lambda rule: -mean(best[rule, "zeros"]))
    rows = [[rule, cells[rule, "zeros"], cells[rule, "random"]] for rule in rules]
    return table(["rule", "filler zeros", "filler random"], rows)


TASKS = ("mqar", "selective_copying", "induction_heads", "noisy_recall", "fuzzy_recall")


def by_task(model: str) -> str:
    """Table 3 for one of its two sizes: means of the rate that was repeated, and their range."""
    groups: dict[tuple, dict] = defaultdict(lambda: defaultdict(list))
    for r in load("table3")["runs"]:
        tags = r["job"]["tags"]
        if (tags["size"], tags["model"]) == ("gpu", model):
            hardest = "64" if tags["task"] == "mqar" else "256"
            groups[tags["task"], tags["kind"]][tags["lr"]].append(r["accuracy"][hardest])
    best = {k: max(v.values(), key=lambda a: (len(a), mean(a))) for k, v in groups.items()}
    cells = {k: f"{with_seeds(v)}, {min(v):.2f} to {max(v):.2f}" for k, v in best.items()}
    rows = [[task.replace("_", " "), *(cells[task, k] for k in KINDS)] for task in TASKS]
    return table(["task", *KINDS], rows)


def farther() -> str:
    """As many pairs as eidetic tokens, at the length trained on and at four times that."""
    groups: dict[tuple, dict] = defaultdict(lambda: defaultdict(list))
    for r in load("harder")["runs"]:
        tags = r["job"]["tags"]
        if tags["size"] == "gpu":
            key = tags["length"], tags["kind"], tags["window"]
            groups[key][tags["lr"]].append(r["accuracy"])
    rows = []
    for (length, kind, window), rates in sorted(groups.items()):
        runs = max(rates.values(), key=lambda runs: (len(runs), sum(map(sum_of, runs))))
        most = str(length // 4)
        near, far = ([a[name] for a in runs] for name in (most, f"{most}@{4 * length}"))
        rows.append([
            str(length), most, kind, "-" if kind in ("mamba", "transformer") else str(window),
            *(f"{with_seeds(x)}, {min(x):.2f} to {max(x):.2f}" for x in (near, far)),
        ])  # fmt: skip
    head = ["L", "pairs", "kind", "window", "accuracy at L", "at 4 L"]
    return table(head, rows)


def sum_of(accuracy: dict[str, float]) -> float:
    """All accuracies of a run together."""
    return sum(accuracy.values())


def outside() -> str:
    """Ours less theirs, in points, on MQAR."""
    runs = [r for r in load("external")["runs"] if r["job"]["tags"]["size"] == "gpu"]
    rows = []
    mamba = "outside_mamba"
    peers = ("transformer", "mistral"), ("mamba", mamba), ("mamba_begun_as_theirs", mamba)
    for ours, theirs in peers:
        differences = []
        for pairs in ("4", "8", "16"):
            best = repeated_rate(runs, ("kind",), pairs)
            both = [best.get((kind,)) for kind in (ours, theirs)]
            differences.append(
                f"{100 * (mean(both[0]) - mean(both[1])):+.2f}" if all(both) else "not recorded"
            )
        rows.append([f"{ours} - {theirs}", *differences])
    return table(["ours - theirs, points", "4 pairs", "8 pairs", "16 pairs"], rows)


def recall() -> str:
    """Figure 2 at 64 pairs, the selection rules, and somebody else's models."""
    return (
        "## Associative recall, 64 pairs, L = 256, window 32\n\n"
        "Mean accuracy of three seeds (or as many as stand in brackets) at the best learning rate, "
        "by width.\n\n" + by_width("figure2") + "\n\nThe same with random filler:\n\n"
        + by_width("figure2_random")
        + "\n\nChapter 10 draws these against the bytes each model carries, and says what of the "
        "paper's figure 2 is reproduced. Selection rules, two blocks of width 64, mean and range "
        "over seeds (chapter 11):\n\n" + by_rule()
        + "\n\nFive tasks, L = 256, window 32, two mixers of width 64 (chapter 12):\n\n"
        + by_task("2_layers") + "\n\nEight mixers of width 128:\n\n" + by_task("8_layers")
        + "\n\nMQAR with as many pairs as eidetic tokens, two mixers of width 64:\n\n" + farther()
        + "\n\nThe same sizes and batches in transformers, L = 128, means over seeds; Mamba has "
        "settled in neither implementation, and its differences are within one and a half of "
        "their standard errors (chapter 12); the last row is ours with the weights theirs begins "
        "with:\n\n"
        + outside()
    )  # fmt: skip


AGAIN = """## Making them again

On a CPU with nothing else to do: `python benchmarks/realization.py`, `realization_hankel.py`,
`scan_cpu.py`, `decode.py` and `dispatch.py`; each says with `--help` where it writes.

On a GPU: `sh benchmarks/gpu_session.sh PART again` writes the records of one part (its head lists
them: tests, operations, models, decoding) into a folder `again`. The GPU tests alone are
`python tests/gpu/record.py --workers 8 --output again/gpu_tests.json`, or `pytest tests/gpu`.

Recall: `python -m bmojo_core.experiments.NAME --size gpu --results again`, where NAME is figure2,
figure2_random, wiring, policies, harder, table3 or external (figure2 and wiring have one size and
take no `--size`); `--list` says what it would run."""


def page() -> str:
    """The whole page."""
    head = (
        "# Measurements\n\n"
        "Every number on this page is written by `benchmarks/report.py` from the records in "
        "`results/`, which hold versions, machine and sizes. Timed comparisons ran in one process "
        "each. Some CPU records were taken on a busy machine: read ratios, not times.\n\n"
    )
    parts = theory(), laptop(), kernels(), models(), decoding(), recall()
    return head + "\n\n".join([part for part in parts if part] + [AGAIN]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))
