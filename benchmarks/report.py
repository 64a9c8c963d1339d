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


def kernels() -> str:
    """The GPU operations."""
    g = load("benchmark_ops_gpu")
    rows = []
    for s in g["scan"]:
        ratio = s["ratio_to_mamba_ssm"]
        rows.append([
            str(tuple(s["shape"])), f"{s['forward_ms']:.2f}", f"{s['forward_backward_ms']:.2f}",
            f"{ratio['forward']:.2f}", f"{ratio['forward_backward']:.2f}", f"{ratio['peak']:.2f}",
            f"{s['forward_over_exponential_floor']:.1f}",
        ])  # fmt: skip
    head = ["(B, L, D), N = 16", "forward ms", "with backward", "forward / mamba-ssm",
            "with backward / mamba-ssm", "peak / mamba-ssm", "forward / exponentials"]  # fmt: skip
    met = sum(
        v <= 0.5 for s in g["scan"] for k, v in s["ratio_to_mamba_ssm"].items() if k != "peak"
    )
    return (
        f"## Kernels on one {g['device']}, bfloat16\n\n"
        + table(head, rows)
        + f"\n\nHalf of mamba-ssm's time was asked for; {met} of the {2 * len(g['scan'])} timings "
        "meet it. The last column is the time over that of the exponentials alone. What limits the "
        "kernels is the issue of instructions, not bytes and not exponentials (`scan_reading` in "
        "`results/benchmark_ops_gpu.json`)."
    )


def models() -> str:
    """Whole models."""
    t = load("throughput")
    by = {(r["preset"], r["kind"], r["length"]): r for r in t["rows"]}
    lengths = sorted({r["length"] for r in t["rows"] if r["preset"] == "1.4b"})
    kinds = ("bmojo", "bmojo_f", "hybrid", "mamba", "transformer", "mistral")
    rows = [
        [kind, *(f"{by['1.4b', kind, n]['forward_ms']:.0f} / "
                 f"{by['1.4b', kind, n]['forward_backward_ms']:.0f}" for n in lengths)]
        for kind in kinds
    ]  # fmt: skip

    def ratio(peer: str, n: int) -> str:
        ours = by["1.4b", "bmojo", n]["forward_backward_ms"]
        return f"{ours / by['1.4b', peer, n]['forward_backward_ms']:.2f}"

    return (
        f"## Whole models, 1.4 billion parameters, one {t['device']}, {t['tokens']} tokens\n\n"
        "Milliseconds of forward / forward and backward, bfloat16, without `torch.compile`. "
        "`transformer` is this library's, with torch's fused attention; `mistral` is transformers' "
        "class in the same sizes.\n\n"
        + table(["kind", *(f"length {n}" for n in lengths)], rows)
        + "\n\nForward and backward of B'MOJO over the Transformer's: "
        + ", ".join(f"{ratio('transformer', n)} at {n}" for n in lengths)
        + "; over transformers' Mistral: "
        + ", ".join(f"{ratio('mistral', n)} at {n}" for n in lengths)
        + ". The paper, on an A100, has B'MOJO ahead of a Transformer at 2k already. On this chip "
        "the crossing with the faster of the two Transformers lies between 8k and 16k."
    )


KINDS = ("mamba", "hybrid", "bmojo_f", "bmojo", "transformer")


def decoding() -> str:
    """One token after a long context, on a GPU; nothing while there is no record."""
    if not (ROOT / "results" / "decode_gpu.json").exists():
        return ""
    d = load("decode_gpu")
    by = {(r["kind"], r["batch"], r["context"]): r for r in d["rows"] if "error" not in r}
    rows = []
    for compared in d["ratios"]:
        kind, batch, context = (compared[name] for name in ("kind", "batch", "context"))
        ours, theirs = by[kind, batch, context], by["mistral", batch, context]
        uncaptured = min(theirs["eager_ms"], theirs["static_ms"])
        rows.append([
            kind, str(context), str(batch), f"{ours['eager_ms']:.1f}", f"{ours['graph_ms']:.1f}",
            f"{uncaptured:.1f}", f"{theirs['graph_ms']:.1f}", f"{compared['over_mistral']:.2f}",
        ])  # fmt: skip
    head = ["kind", "context", "batch", "step by step, ms", "as a graph", "Mistral step by step",
            "Mistral as a graph", "tokens per second over Mistral's"]  # fmt: skip
    bars = [r for r in d["ratios"] if "bar" in r]
    met = [f"batch {r['batch']}" for r in bars if r["met"]]
    missed = [f"batch {r['batch']}" for r in bars if not r["met"]]
    return (
        f"## Decoding on one {d['device']}, preset {d['preset']}, bfloat16\n\n"
        "Milliseconds of one token of every row, called step by step from Python and captured as a "
        "CUDA graph (`bmojo_core.DecodeGraph`). Mistral is transformers' class in the same size "
        "with full attention; step by step with the faster of its two caches. The last column "
        "compares the fastest way of each.\n\n"
        + table(head, rows)
        + f"\n\n{bars[0]['bar']:.0f} times was asked for at {bars[0]['context']} tokens. Met: "
        f"{', '.join(met) or 'nowhere'}; not met: {', '.join(missed) or 'nowhere'}. A captured "
        "step takes as long after 32768 tokens as after 2048; at batch 1 the number of its "
        "short kernels sets that time."
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


def outside() -> str:
    """Ours less theirs, in points, on MQAR."""
    runs = [r for r in load("external")["runs"] if r["job"]["tags"]["size"] == "gpu"]
    rows = []
    for ours, theirs in (("transformer", "mistral"), ("mamba", "outside_mamba")):
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
        + "\n\nThe same sizes and batches in transformers, L = 128, means over seeds (chapter 12):"
        "\n\n" + outside()
    )  # fmt: skip


def page() -> str:
    """The whole page."""
    head = (
        "# Measurements\n\n"
        "Every number on this page is written by `benchmarks/report.py` from the records in "
        "`results/`, which hold versions, machine and sizes. Timed comparisons ran in one process "
        "each. Some CPU records were taken on a busy machine: read ratios, not times.\n\n"
    )
    parts = theory(), laptop(), kernels(), models(), decoding(), recall()
    return head + "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))
