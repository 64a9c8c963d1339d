"""Against somebody else: transformers' Mistral and Mamba on the same examples.

Our Transformer has the sizes of their Mistral and our Mamba those of their Mamba, weight for
weight (the tests compare the counts).  Recipe, batches and learning rates are the same; at the
best rate the mean accuracies should agree within a point wherever both have settled.  Their Mamba
begins with other weights than ours; ours runs with those, too.

    --size gpu    L = 128, up to 16 pairs, d = 64, two blocks
    --size cpu    L = 32, up to 4 pairs, d = 32, two blocks
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmojo_core.experiments.command import main
from bmojo_core.experiments.packed import Job
from bmojo_core.experiments.sweep import repeats

PAIRS = {"transformer": "mistral", "mamba": "outside_mamba"}  # ours: theirs
BEGUN_AS_THEIRS = "mamba_begun_as_theirs"


@dataclass(frozen=True)
class Size:
    """Width d, heads, width of the MLP, the task and the recipe."""

    d: int
    heads: int
    mlp: int
    task: dict[str, Any]
    rates: tuple[float, ...]
    steps: int
    batch: int
    seeds: tuple[int, ...]


CPU = Size(
    d=32, heads=2, mlp=64,
    task={"seq_len": 32, "pairs": [2, 4], "vocab_size": 32, "examples": 4000, "held_out": 256},
    rates=(4e-3,), steps=500, batch=32, seeds=(1,),
)  # fmt: skip
GPU = Size(
    d=64, heads=2, mlp=128, task={"seq_len": 128, "pairs": [4, 8, 16], "vocab_size": 1024},
    rates=(1e-3, 3e-3, 9e-3), steps=4000, batch=64, seeds=(1, 2, 3, 4),
)  # fmt: skip
SIZES = {"cpu": CPU, "gpu": GPU}
LAYERS = 2
STATE = 16


def sizes(kind: str, size: Size) -> dict[str, Any]:
    """The same model in ours and in transformers' words."""
    own = {"hidden_size": size.d, "num_heads": size.heads}
    their_mamba = {"hidden_size": size.d, "num_hidden_layers": LAYERS, "expand": 2,
                   "state_size": STATE, "layer_norm_epsilon": 1e-5}  # fmt: skip
    return {
        "transformer": {
            **own, "layer_types": ["attention", "feedforward"] * LAYERS, "num_layers": LAYERS,
            "intermediate_size": size.mlp, "position": "rope",
        },
        "mamba": {**own, "layer_types": ["mamba"] * LAYERS, "num_layers": LAYERS,
                  "ssm_intermediate_size": 2 * size.d, "state_size": STATE},
        "mistral": {
            "hidden_size": size.d, "num_hidden_layers": LAYERS, "intermediate_size": size.mlp,
            "num_attention_heads": size.heads, "num_key_value_heads": size.heads,
            "sliding_window": None, "rms_norm_eps": 1e-5,
        },
        "outside_mamba": their_mamba,
        BEGUN_AS_THEIRS: their_mamba,
    }[kind]  # fmt: skip


def job(name: str, kind: str, lr: float) -> Job:
    """One run of the size called ``name``."""
    size = SIZES[name]
    tags = {"size": name, "kind": kind, "lr": lr, "seed": 0}
    return Job(kind, sizes(kind, size), size.task, steps=size.steps, batch=size.batch, lr=lr,
               warmup=0.2, evaluate_every=size.steps // 4, tags=tags)  # fmt: skip


def jobs(folder: Path, size: str) -> list[Job]:
    """Ours and theirs at every rate; then the best rates again with other seeds."""
    s = SIZES[size]
    kinds = [*(kind for both in PAIRS.items() for kind in both), BEGUN_AS_THEIRS]
    first = [job(size, kind, lr) for lr in s.rates for kind in kinds]
    return first + repeats(first, folder, s.seeds)


if __name__ == "__main__":
    main("external", jobs, __doc__.splitlines()[0])
