"""Table 3: five synthetic tasks, five kinds, two mixers and a larger model.

Selective copying and induction heads as Mamba poses them, noisy and fuzzy recall as MAD does, and
MQAR.  Every kind gets the same examples, steps and learning rates; the best rate, by accuracy on
the held-out examples, is repeated with other seeds.  Induction heads are also asked at lengths
never trained on.

    --size gpu    L = 256, window 32, d = 64 with two mixers and d = 128 with eight
    --size cpu    L = 32, window 4, d = 32 with two mixers: a few seconds a run
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmojo_core.experiments.command import main
from bmojo_core.experiments.packed import Job
from bmojo_core.experiments.sweep import KINDS, mixers, repeats


@dataclass(frozen=True)
class Size:
    """Tasks, models and recipe of one size; ``models`` maps a name to blocks and sizes."""

    tasks: dict[str, dict[str, Any]]
    models: dict[str, tuple[int, dict[str, Any]]]
    rates: tuple[float, ...]
    steps: int
    batch: int
    seeds: tuple[int, ...]


FEW = {"examples": 4000, "held_out": 128}
CPU = Size(
    tasks={
        "mqar": {"seq_len": 32, "pairs": [2, 4], "vocab_size": 32, **FEW},
        "selective_copying": {"seq_len": 32, "num_tokens": 6, "vocab_size": 10, **FEW},
        "induction_heads": {"seq_len": 32, "vocab_size": 10, "evaluate_lengths": [64], **FEW},
        "noisy_recall": {"seq_len": 32, "vocab_size": 24, "noise_vocab_size": 6, **FEW},
        "fuzzy_recall": {"seq_len": 32, "vocab_size": 12, "key_size": 2, "value_size": 2, **FEW},
    },
    models={
        "2_layers": (1, {
            "hidden_size": 32, "num_heads": 2, "window": 4, "num_fading_tokens": 1,
            "num_eidetic_tokens": 8, "state_size": 4,
        }),
    },
    rates=(1e-2, 4e-3), steps=400, batch=32, seeds=(1, 2),
)  # fmt: skip
MEMORY = {"window": 32, "num_fading_tokens": 8, "num_eidetic_tokens": 64}
GPU = Size(
    tasks={
        "mqar": {"seq_len": 256, "pairs": [4, 8, 16, 32, 64]},
        "selective_copying": {"seq_len": 256, "num_tokens": 16, "vocab_size": 16},
        "induction_heads": {"seq_len": 256, "vocab_size": 16, "evaluate_lengths": [512, 1024]},
        "noisy_recall": {"seq_len": 256, "vocab_size": 96, "noise_vocab_size": 16},
        "fuzzy_recall": {"seq_len": 256, "vocab_size": 32},
    },
    models={
        "2_layers": (1, {"hidden_size": 64, "num_heads": 1, **MEMORY}),
        "8_layers": (4, {"hidden_size": 128, "num_heads": 2, **MEMORY}),
    },
    rates=(1e-3, 3e-3, 9e-3), steps=3000, batch=64, seeds=(1, 2),
)  # fmt: skip
SIZES = {"cpu": CPU, "gpu": GPU}


def first_pass(size: Size, name: str) -> list[Job]:
    """Every task, model, kind and rate with one seed."""
    return [
        job(size, name, task, model, kind, lr)
        for lr in size.rates for model in size.models for task in size.tasks for kind in KINDS
    ]  # fmt: skip


def job(size: Size, name: str, task: str, model: str, kind: str, lr: float) -> Job:
    """One run; ``task`` names its examples, ``model`` its sizes."""
    blocks, sizes = size.models[model]
    examples = size.tasks[task] if task == "mqar" else {"task": task, **size.tasks[task]}
    tags = {"size": name, "model": model, "task": task, "kind": kind, "lr": lr, "seed": 0}
    return Job(kind, mixers(kind, blocks, **sizes), examples, steps=size.steps, batch=size.batch,
               lr=lr, warmup=0.2, evaluate_every=size.steps // 4, tags=tags)  # fmt: skip


def jobs(folder: Path, size: str) -> list[Job]:
    """The whole table, as far as the records let it be known."""
    first = first_pass(SIZES[size], size)
    return first + repeats(first, folder, SIZES[size].seeds)


if __name__ == "__main__":
    main("table3", jobs, __doc__.splitlines()[0])
