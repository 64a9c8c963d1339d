"""What should be remembered?  Eight selection rules at equal memory, watched while they train.

One model, one task (MQAR with as many pairs as eidetic tokens, or twice as many places as pairs at
CPU size), both fillers; only the rule differs.  Every evaluation records the accuracy and, layer
by layer, the share of the values' and of the keys' tokens that memory holds while the last chunk
is read.  One learning rate serves all rules where rates are not swept, for the model is the same.

    --size gpu    L = 256, 64 pairs, window 32, m_e = 64, two blocks, d = 64
    --size cpu    L = 32, 4 pairs, window 4, m_e = 8, one block, d = 32
"""

from __future__ import annotations

import hashlib
import inspect
import json
import marshal
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bmojo_core.experiments.command import main
from bmojo_core.experiments.packed import Job, run_jobs
from bmojo_core.experiments.sweep import mixers, repeats, with_seed
from bmojo_core.layers.selection import POLICIES

RULES = (
    "innovation", "learned_predictor", "accumulated_attention", "key_diversity", "random", "oracle",
    "normalized_innovation", "recency",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Tasks by filler, the model, and the recipe."""

    tasks: dict[str, dict[str, Any]]
    blocks: int
    model: dict[str, Any]
    rates: tuple[float, ...]
    steps: int
    batch: int
    warmup: float
    seeds: tuple[int, ...]


FEW = {"seq_len": 32, "pairs": [2, 4], "examples": 4000, "held_out": 128}
MANY = {"seq_len": 256, "pairs": [4, 8, 16, 32, 64]}
CPU = Size(
    tasks={
        "zeros": {**FEW, "vocab_size": 32},
        "random": {**FEW, "filler": "random", "vocab_size": 128},  # filler seldom looks like a key
    },
    blocks=1,
    model={
        "hidden_size": 32, "num_heads": 2, "window": 4, "num_fading_tokens": 1,
        "num_eidetic_tokens": 8, "state_size": 4,
    },
    rates=(1e-2,), steps=300, batch=32, warmup=0.3, seeds=(1, 2),
)  # fmt: skip
GPU = Size(
    tasks={"random": {**MANY, "filler": "random"}, "zeros": {**MANY, "filler": "zeros"}},
    blocks=2,
    model={
        "hidden_size": 64, "num_heads": 1, "window": 32, "num_fading_tokens": 8,
        "num_eidetic_tokens": 64,
    },
    rates=(2e-3, 6e-3), steps=4000, batch=64, warmup=0.1, seeds=(1, 2),
)  # fmt: skip
SIZES = {"cpu": CPU, "gpu": GPU}


def job(name: str, filler: str, rule: str, lr: float, seed: int = 0) -> Job:
    """One run of the size called ``name``."""
    size = SIZES[name]
    sizes = mixers("bmojo", size.blocks, **size.model, selection=rule)
    tags = {"size": name, "filler": filler, "rule": rule, "lr": lr, "seed": seed}
    return Job("bmojo", sizes, size.tasks[filler], steps=size.steps, batch=size.batch, lr=lr,
               warmup=size.warmup, seed=seed, evaluate_every=size.steps // 6, stop_at=2.0,
               tags=tags)  # fmt: skip


def jobs(folder: Path, size: str) -> list[Job]:
    """All rules with both fillers, then the best rates again with other seeds."""
    s = SIZES[size]
    first = [job(size, f, rule, lr) for lr in s.rates for f in s.tasks for rule in RULES]
    return first + repeats(first, folder, s.seeds)


def compare(
    rules: Iterable[str], folder: str | Path, size: str = "cpu",
    fillers: Sequence[str] = ("zeros",), seeds: Sequence[int] = (0,), steps: int | None = None,
    device: str = "cpu",
) -> dict[tuple[str, str], list[dict[str, Any]]]:  # fmt: skip
    """Train with each of the rules, a rule of your own among them, and return the records.

    Parameters
    ----------
    rules
        Names of registered policies.
    folder
        Of the records, one file a run.  What is there is not run again; a rule whose function has
        changed is.
    size, fillers, seeds, steps
        Of the models and the task, as in this sweep, at the size's first rate; ``steps`` for a
        shorter run.

    Returns
    -------
    records : dict
        By (filler, rule), one record a seed: ``evaluations`` is the curve of accuracy and of what
        was kept (`Job`, `run_jobs`).

    Raises
    ------
    ValueError
        For a rule that is not registered.
    """
    wanted: dict[tuple[str, str], list[str]] = defaultdict(list)
    jobs = []
    for rule in dict.fromkeys(rules):
        if rule not in POLICIES:
            raise ValueError(f"rules must be among {sorted(POLICIES)}, got {rule!r}")
        for filler in fillers:
            one = job(size, filler, rule, SIZES[size].rates[0])
            one = replace(one, steps=steps or one.steps, tags={**one.tags, "rule_is": _hash(rule)})
            every = max(1, one.steps // 6)
            jobs += [with_seed(replace(one, evaluate_every=every), seed) for seed in seeds]
            wanted[filler, rule] = [j.name for j in jobs[-len(seeds) :]]
    run_jobs(jobs, folder, device=device)
    return {
        key: [json.loads((Path(folder) / f"{name}.json").read_text()) for name in names]
        for key, names in wanted.items()
    }


def _hash(rule: str) -> str:
    """Of the rule's source text, or of its code with its constants where there is no text."""
    try:
        text = inspect.getsource(POLICIES[rule]).encode()
    except (OSError, TypeError):
        text = marshal.dumps(POLICIES[rule].__code__)
    return hashlib.sha256(text).hexdigest()[:8]


if __name__ == "__main__":
    main("policies", jobs, __doc__.splitlines()[0])
