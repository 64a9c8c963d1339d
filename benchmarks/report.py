"""Write docs/measurements.md from the records in results/: no number there is typed by hand.

python benchmarks/report.py            # a test compares the page with what this would write
"""

from __future__ import annotations

from report_recall import recall
from report_records import ROOT, load, table

PAGE = ROOT / "docs" / "measurements.md"


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
KEPT_CONVOLUTION = [16, 3]  # rows ahead and blocks a multiprocessor, as causal_conv/gpu.py has them


def kernels() -> str:
    """Scans against mamba-ssm's, attention against torch's, convolutions against their bytes."""
    cards = [load(name) for name in CARDS]
    scans, met = [], 0
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
    head = ["GPU", "(B, L, D), N = 16", "forward ms", "with backward", "forward / mamba-ssm",
            "with backward / mamba-ssm", "peak / mamba-ssm", "forward / exponentials",
            "forward / bytes"]  # fmt: skip
    return (
        "## Kernels on one GPU, bfloat16\n\nThe selective scan:\n\n"
        + table(head, scans)
        + f"\n\nHalf of mamba-ssm's time was asked for; {met} of the {2 * len(scans)} timings "
        "meet it. The last columns are the time over that of the exponentials alone and over that "
        "of reading and writing.\n\n"
        + later_scans() + attention(cards) + convolutions()
    )  # fmt: skip


def later_scans() -> str:
    """Today's scan: against mamba-ssm, and what became of the forward pass on the way."""
    record, tuning = load("benchmark_scan_conv_h100"), load("scan_tuning_h100")
    rows = []
    for s in record["scan"]:
        ratio = [s[k] / s["mamba_ssm"][k] for k in ("forward_ms", "forward_backward_ms")]
        rows.append([str(tuple(s["shape"])), *(f"{r:.3f}" for r in ratio),
                     *(f"{best(tuning, s['shape'], k):.3f}" for k in ("before", "matrix", "kept")),
                     *(f"{x:.2f}" for x in backward_alone(tuning, s["shape"]))])  # fmt: skip
    head = ["(B, L, D)", "forward / mamba-ssm", "with backward / mamba-ssm", "forward before, ms",
            "on matrix units, ms", "kept, ms", "backward before, ms", "kept, ms"]  # fmt: skip
    return (
        f"The kernels were changed after that and timed again, on one {record['device']} (the "
        "first two columns with the sums over states on the matrix units; the others are "
        "`results/scan_tuning_h100.json`, the best cut of each, `before` in a process of its "
        "own):\n\n" + table(head, rows)
        + "\n\nIn tf32 on the matrix units, the sum over states costs fewer instructions than by "
        "exchanges between lanes, and more time: instructions alone are not what the forward pass "
        "waits for, as an earlier reading had it (`scan_reading` in "
        "`results/benchmark_ops_gpu.json`). What `kept` shares with it: B and C are converted when "
        "they are used, not where they are loaded, rows are padded, pointers walk, and softplus is "
        "a polynomial; these were not timed one by one.\n\n"
    )  # fmt: skip


def best(tuning: dict, shape: list[int], kernel: str) -> float:
    """The fastest cut of one forward kernel, in ms."""
    rows = (r for r in tuning["rows"] if r["shape"] == shape and r["kernel"].startswith(kernel))
    return min(r["forward_ms"] for r in rows)


def backward_alone(tuning: dict, shape: list[int]) -> list[float]:
    """The backward pass before and after, in ms."""
    return [r["backward_ms"] for r in tuning["backward"] if r["shape"] == shape]


def convolutions() -> str:
    """The short convolution against its bytes and against causal-conv1d."""
    record, tuning = load("benchmark_scan_conv_h100"), load("conv_tuning_h100")["rows"]
    rows = []
    for c in record["conv"]:
        theirs = c["causal_conv1d"]
        kept = next(r["forward_over_bytes"] for r in tuning
                    if r["shape"] == c["shape"] and r["forward"] == KEPT_CONVOLUTION)  # fmt: skip
        rows.append([
            str(tuple(c["shape"])), f"{c['forward_ms']:.3f}", f"{c['forward_over_floor']:.2f}",
            f"{kept:.2f}", f"{c['forward_ms'] / theirs['forward_ms']:.3f}",
            f"{c['forward_backward_over_floor']:.2f}",
            f"{c['forward_backward_ms'] / theirs['forward_backward_ms']:.3f}",
        ])  # fmt: skip
    head = ["(B, L, D), 4 taps", "forward ms", "forward / bytes", "the same, as kept",
            "forward / causal-conv1d", "with backward / bytes",
            "with backward / causal-conv1d"]  # fmt: skip
    apart = max(c["causal_conv1d"]["largest_difference"] for c in record["conv"])
    return (
        f"The short convolution, one {record['device']}; at most 1.3 times the time of its bytes "
        "was asked for, or no more than causal-conv1d's (the largest difference of the outputs: "
        f"{apart:.0f}). What is kept asks for 16 rows ahead forward, not for 8 "
        "(`results/conv_tuning_h100.json`, another process):\n\n" + table(head, rows)
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
        + captured() + spent()
    )  # fmt: skip


def captured() -> str:
    """Small models without the time that a host takes to launch them."""
    record, rows = load("throughput_captured"), []
    for size in ("370m", "130m"):
        ms = steps_of(record, size)
        lengths = sorted({length for _, length in ms})
        rows.append([size, *(f"{ms['bmojo', n] / ms['transformer', n]:.2f}" for n in lengths)])
    return (
        f"\n\nThe two smallest are launched more slowly than they run. Captured as a CUDA graph, "
        f"one {record['device']}, a training step of B'MOJO over the Transformer's:\n\n"
        + table(["parameters", *(f"length {n}" for n in lengths)], rows)
    )  # fmt: skip


OF_A_STEP = {
    "products with weights": ("nvjet",),
    "scan": ("scan_",),
    "attention": ("forward", "key_gradients", "query_gradients", "memory_gradients"),
    "norms": ("void at::native::(anonymous namespace)::layer_norm", "void at::native::(anonymous "
              "namespace)::GammaBeta", "void at::native::(anonymous namespace)::vectorized_layer"),
    "convolution": ("conv_",),
}  # fmt: skip


def spent() -> str:
    """Where a long training step spends its time, kernel by kernel."""
    record = load("profile_1.4b_32k")
    parts = {
        part: sum(k["ms"] for k in record["kernels"] if k["kernel"].startswith(names))
        for part, names in OF_A_STEP.items()
    }
    shares = ", ".join(f"{part} {ms:.0f} ms" for part, ms in parts.items())
    return (
        f"\n\nOf a training step of {record['preset']} over one sequence of {record['length']} "
        f"tokens ({record['device']}, under torch's profiler) the device is busy for "
        f"{record['total_ms']:.0f} ms: {shares}; the rest are sums, copies, the memory's "
        "gather and selection. (The forward scan is the one on the matrix units.)"
    )


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
        f"the last column is {of_370m['over_mistral']:.2f}.\n\n" + against_compiled()
    )


def against_compiled() -> str:
    """A third run: Mistral compiled as well, and a fault of ours that it showed."""
    records = [load(f"decode_gpu{name}_compiled_mistral") for name in ("", "_370m")]
    rows = []
    for record in records:
        by = {(r["kind"], r["batch"]): r for r in record["rows"]}
        for r in record["ratios"]:
            ours, theirs = by[r["kind"], r["batch"]], by["mistral", r["batch"]]
            rows.append([
                record["preset"], r["kind"], str(r["batch"]), f"{ours['graph_ms']:.2f}",
                f"{theirs['graph_ms']:.2f}", f"{theirs['compiled_ms']:.2f}",
                f"{r['over_mistral']:.2f}", f"{r['over_compiled']:.2f}",
            ])  # fmt: skip
    head = ["preset", "kind", "batch", "as a graph, ms", "Mistral as a graph", "Mistral compiled",
            "over Mistral", "over Mistral compiled"]  # fmt: skip
    earlier = {r["batch"]: r["kernels"] for r in load("decode_gpu_again")["rows"]
               if r["kind"] == "bmojo"}  # fmt: skip
    now = {r["batch"]: r["kernels"] for r in records[0]["rows"] if r["kind"] == "bmojo"}
    return (
        f"A third run, at {records[0]['rows'][0]['context']} tokens, also timed Mistral under "
        "`torch.compile`. B'MOJO's step was longer in it than it need be: under torch 2.11 the "
        f"traced step did not see what the host knew of the rows, and had {now[1]} kernels at "
        f"batch 1 and {now[32]} at batch 32 where the second run had {earlier[1]} and "
        f"{earlier[32]}. That is mended, with a test that fails without it, and has not been timed "
        "again:\n\n" + table(head, rows)
    )  # fmt: skip


AGAIN = """## Making them again

On a CPU with nothing else to do: `python benchmarks/realization.py`, `realization_hankel.py`,
`scan_cpu.py`, `decode.py` and `dispatch.py`; each says with `--help` where it writes.

On a GPU: `sh benchmarks/gpu_session.sh PART again` writes the records of one part (its head lists
them: tests, operations, models, decoding) into a folder `again`. The GPU tests alone are
`python tests/gpu/record.py --workers 6 --output again/gpu_tests.json`, or `pytest tests/gpu`.

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
