"""How must the memories be wired?  The study behind the defaults of `BMojoConfig`.

The paper does not say whether the SSM's output joins the residual stream, whether fading tokens
are normalised before they are projected, how many there are, or whether memory tokens have
projections of their own.  Each variant changes one choice of a base model on the hardest panel of
figure 2 (L = 256, window 32, up to 64 pairs), with the same recipe and the same examples.

    base: one stacked block, d = 128, m_f = 1 normalised, m_e = 64 by innovation, shared projections
"""

from __future__ import annotations

from typing import Any

from bmojo_core.experiments.command import command
from bmojo_core.experiments.packed import Job

TASK = {"seq_len": 256, "pairs": [4, 8, 16, 32, 64], "filler": "zeros"}
RANDOM_FILLER = {**TASK, "filler": "random"}
BASE = {
    "hidden_size": 128, "num_layers": 1, "num_heads": 2, "window": 32, "num_fading_tokens": 1,
    "num_eidetic_tokens": 64,
}  # fmt: skip

# name: (kind, what differs from BASE)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("bmojo", {}),
    "no_fading_token": ("bmojo", {"num_fading_tokens": 0}),
    "fading_unnormalized": ("bmojo", {"normalize_fading": False}),
    "fading_8": ("bmojo", {"num_fading_tokens": 8}),
    "fading_32": ("bmojo", {"num_fading_tokens": 32}),
    "separate_projections": ("bmojo", {"memory_projections": "separate"}),
    "key_convolution": ("bmojo", {"key_kernel": 3}),
    "key_convolution_no_fading": ("bmojo", {"key_kernel": 3, "num_fading_tokens": 0}),
    "stored_after_window": ("bmojo", {"store_in_window": False}),
    "innovation_normalized_y": ("bmojo", {"normalize_innovation": True}),
    "parallel": ("bmojo", {"wiring": "parallel"}),
    "parallel_fading_32": ("bmojo", {"wiring": "parallel", "num_fading_tokens": 32}),
    "parallel_key_convolution": ("bmojo", {"wiring": "parallel", "key_kernel": 3}),
    "memory_32": ("bmojo", {"num_eidetic_tokens": 32}),
    "memory_128": ("bmojo", {"num_eidetic_tokens": 128}),
    "random": ("bmojo", {"selection": "random"}),
    "recency": ("bmojo", {"selection": "recency"}),
    "key_diversity": ("bmojo", {"selection": "key_diversity"}),
    "oracle": ("bmojo", {"selection": "oracle"}),
    "bmojo_f": ("bmojo_f", {}),
    "bmojo_f_no_fading_token": ("bmojo_f", {"num_fading_tokens": 0}),
    "hybrid": ("hybrid", {}),
    "mamba": ("mamba", {}),
    "transformer": (
        "transformer",
        {"layer_types": ["attention", "attention"], "position": "rope", "window": None},
    ),
}


def jobs(seeds: tuple[int, ...] = (0, 1), steps: int = 6000) -> list[Job]:
    """Every variant with every seed, zeros as filler; some of them with random filler too."""
    both = ("base", "no_fading_token", "oracle", "random", "hybrid", "innovation_normalized_y")
    made = [_job(v, TASK, "zeros", seed, steps) for seed in seeds for v in VARIANTS]
    return made + [_job(v, RANDOM_FILLER, "random", seed, steps) for seed in seeds for v in both]


def _job(variant: str, task: dict[str, Any], filler: str, seed: int, steps: int) -> Job:
    kind, changes = VARIANTS[variant]
    sizes = {**BASE, **changes}
    tags = {"variant": variant, "filler": filler, "seed": seed}
    return Job(kind, sizes, task, steps=steps, seed=seed, evaluate_every=1000, tags=tags, lr=2e-3)


if __name__ == "__main__":
    command("wiring", lambda _: jobs(), __doc__.splitlines()[0])
