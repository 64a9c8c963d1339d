"""What the sweeps share: two mixers a block for every kind, and repeats at the best rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bmojo_core.experiments.packed import Job, load_records

KINDS = ("bmojo", "bmojo_f", "hybrid", "mamba", "transformer")


def mixers(kind: str, blocks: int = 1, **sizes: Any) -> dict[str, Any]:
    """Sizes of ``blocks`` blocks of two mixers without MLP, as the field runs recall tasks.

    The Transformer sees everything and has rotary positions, for it has nothing else to tell them.
    """
    made = {"num_layers": blocks, **sizes}
    if kind == "transformer":
        made |= {"window": None, "position": "rope", "layer_types": ["attention"] * 2 * blocks}
    return made


def repeats(first: Iterable[Job], folder: Path, seeds: Iterable[int] = (1, 2)) -> list[Job]:
    """The best rate of every group of jobs that differ in nothing else, with more seeds.

    A group has a best rate once all of its jobs are recorded; which one it is, the sum of the
    accuracies says.
    """
    score = {r["job_name"]: sum(r["accuracy"].values()) for r in _named(folder)}
    groups: dict[str, list[Job]] = defaultdict(list)
    for job in first:
        tags = {k: v for k, v in job.tags.items() if k != "lr"}
        groups[replace(job, lr=0.0, tags=tags).name].append(job)
    found = [jobs for jobs in groups.values() if all(job.name in score for job in jobs)]
    best = [max(jobs, key=lambda job: score[job.name]) for jobs in found]
    return [with_seed(job, seed) for seed in seeds for job in best]


def with_seed(job: Job, seed: int) -> Job:
    """The same job from other weights and other batches."""
    return replace(job, seed=seed, tags={**job.tags, "seed": seed})


def _named(folder: Path) -> list[dict[str, Any]]:
    return [{**r, "job_name": Job(**r["job"]).name} for r in load_records(folder)]
