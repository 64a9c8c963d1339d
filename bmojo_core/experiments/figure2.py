"""Figure 2: associative recall against memory, five kinds, three difficulties; and against m_e.

L = 256, window 32, two mixers a model (so one block of hybrid and B'MOJO kinds), no MLP, as the
field runs it.  One recipe for all kinds: the same mixture of 4 to 64 pairs, the same number of
steps, three learning rates each; where the best one lies at the grid's edge, the grid grows by a
factor of three until it does not; the best rate is then repeated with other seeds.  Panels 1 to 3
are the accuracies of the same models at 16, 32 and 64 pairs; panel 4 varies the eidetic tokens.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from bmojo_core.experiments.command import command
from bmojo_core.experiments.packed import Job, load_records

TASK = {"seq_len": 256, "pairs": [4, 8, 16, 32, 64], "filler": "zeros"}
WIDTHS = (8, 16, 32, 64, 128)
RATES = (1e-3, 3e-3, 9e-3)
EIDETIC = (0, 8, 16, 32, 48, 64, 96, 128)
STEPS = 4000


def sizes(kind: str, width: int) -> dict[str, Any]:
    """Two mixers of one width; the Transformer has positions, for it has nothing else."""
    made: dict[str, Any] = {
        "hidden_size": width, "num_layers": 1, "num_heads": max(1, width // 64), "window": 32,
        "num_fading_tokens": 8, "num_eidetic_tokens": 64,
    }  # fmt: skip
    if kind == "transformer":
        made |= {"window": None, "position": "rope", "layer_types": ["attention", "attention"]}
    return made


def job(kind: str, width: int, lr: float, seed: int, eidetic: int | None = None) -> Job:
    """One run of panels 1 to 3, or of panel 4 when ``eidetic`` is given."""
    changes = {} if eidetic is None else {"num_eidetic_tokens": eidetic}
    tags = {"kind": kind, "width": width, "lr": lr, "seed": seed}
    if eidetic is not None:
        tags["eidetic"] = eidetic
    return Job(kind, {**sizes(kind, width), **changes}, TASK, steps=STEPS, lr=lr, seed=seed,
               evaluate_every=1000, tags=tags)  # fmt: skip


def first_pass() -> list[Job]:
    """Every kind, width and rate with one seed."""
    kinds = ("bmojo", "bmojo_f", "hybrid", "mamba", "transformer")
    return [job(k, w, lr, 0) for w in reversed(WIDTHS) for k in kinds for lr in RATES]


def scores(folder: Path) -> dict[tuple[str, int], dict[float, float]]:
    """Sum of accuracies by kind and width, and then by rate, of the recorded first seeds."""
    score: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for record in load_records(folder):
        tags = record["job"]["tags"]
        if tags["seed"] == 0 and "eidetic" not in tags:
            by_rate = score[tags["kind"], tags["width"]]
            by_rate[tags["lr"]] = sum(record["accuracy"].values())
    return score


def beyond(folder: Path) -> list[Job]:
    """One rate more wherever the best of at least three lies at the edge of its grid.

    Not beyond a hundredfold of either edge; rates are rounded, so that names stay the same.
    """
    made = []
    for (kind, width), rates in scores(folder).items():
        best, grid = max(rates, key=rates.get), sorted(rates)
        more = {grid[0]: best / 3, grid[-1]: best * 3}.get(best)
        if len(grid) >= 3 and more and RATES[0] / 100 < more < RATES[-1] * 100:
            made.append(job(kind, width, float(f"{more:.3g}"), 0))
        made += [job(kind, width, lr, 0) for lr in grid if lr not in RATES]
    return made


def repeats(folder: Path, seeds: tuple[int, ...] = (1, 2)) -> list[Job]:
    """The best rate of each kind and width, with more seeds; the records decide which it is."""
    best = {key: max(rates, key=rates.get) for key, rates in scores(folder).items()}
    return [job(k, w, lr, seed) for (k, w), lr in best.items() for seed in seeds]


def panel_4(width: int = 128, lr: float = 3e-3, seeds: tuple[int, ...] = (0, 1, 2)) -> list[Job]:
    """Accuracy against the number of eidetic tokens."""
    return [job("bmojo", width, lr, seed, eidetic=m) for m in EIDETIC for seed in seeds]


def jobs(results: str | Path) -> list[Job]:
    """The whole figure, as far as the records let it be known."""
    folder = Path(results) / "runs" / "figure2"
    return first_pass() + panel_4() + beyond(folder) + repeats(folder)


if __name__ == "__main__":
    command("figure2", jobs, __doc__.splitlines()[0])
