"""The part of the page of measurements about recall; written by report.py."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean

from report_records import load, table

KINDS = ("mamba", "hybrid", "bmojo_f", "bmojo", "transformer")


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
