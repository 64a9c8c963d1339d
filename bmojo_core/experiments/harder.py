"""Harder than the paper: longer sequences, more pairs, and four times the length trained on.

L = 512 with up to 128 pairs and L = 1024 with up to 256, windows 32 and 64, one eidetic token a
pair.  Each model is also asked at 4 L: the pairs are as many, the queries up to four times as far.
Kinds without a window run once.

    --size gpu    as above, d = 64
    --size cpu    L = 64 with up to 8 pairs, windows 4 and 8, d = 32
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmojo_core.experiments.command import main
from bmojo_core.experiments.packed import Job
from bmojo_core.experiments.sweep import KINDS, mixers, repeats

UNWINDOWED = ("mamba", "transformer")


@dataclass(frozen=True)
class Size:
    """Most pairs by sequence length, and what all runs share."""

    pairs: dict[int, int]
    windows: tuple[int, ...]
    task: dict[str, Any]
    model: dict[str, Any]
    rates: tuple[float, ...]
    steps: int
    batch: int
    seeds: tuple[int, ...]


CPU = Size(
    pairs={64: 8}, windows=(4, 8), task={"vocab_size": 64, "examples": 4000, "held_out": 128},
    model={"hidden_size": 32, "num_heads": 2, "num_fading_tokens": 1, "state_size": 4},
    rates=(1e-2,), steps=500, batch=32, seeds=(1,),
)  # fmt: skip
GPU = Size(
    pairs={512: 128, 1024: 256}, windows=(32, 64), task={"held_out": 256},
    model={"hidden_size": 64, "num_heads": 1, "num_fading_tokens": 8},
    rates=(2e-3, 6e-3), steps=4000, batch=64, seeds=(1, 2),
)  # fmt: skip
SIZES = {"cpu": CPU, "gpu": GPU}


def mixture(most: int) -> list[int]:
    """Five difficulties that double up to ``most`` (fewer where there is no room below)."""
    return [most >> i for i in reversed(range(5)) if most >> i >= 2]


def job(name: str, length: int, window: int, kind: str, lr: float) -> Job:
    """One run of the size called ``name``."""
    size, most = SIZES[name], SIZES[name].pairs[length]
    task = {"seq_len": length, "pairs": mixture(most), "evaluate_lengths": [4 * length],
            **size.task}  # fmt: skip
    sizes = mixers(kind, window=window, num_eidetic_tokens=most, **size.model)
    if kind == "transformer":
        sizes["window"] = None
    tags = {"size": name, "length": length, "window": window, "kind": kind, "lr": lr, "seed": 0}
    return Job(kind, sizes, task, steps=size.steps, batch=size.batch, lr=lr, warmup=0.2,
               evaluate_every=size.steps // 4, tags=tags)  # fmt: skip


def jobs(folder: Path, size: str) -> list[Job]:
    """Every length, window and kind; then the best rates again with other seeds."""
    s = SIZES[size]
    first = [
        job(size, length, window, kind, lr)
        for lr in s.rates for length in s.pairs for window in s.windows for kind in KINDS
        if window == s.windows[0] or kind not in UNWINDOWED
    ]  # fmt: skip
    return first + repeats(first, folder, s.seeds)


if __name__ == "__main__":
    main("harder", jobs, __doc__.splitlines()[0])
