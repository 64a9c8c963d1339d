"""Figure 2's hard panel with random tokens between the queries instead of zeros.

Zeros are predictable, and an innovation test passes them over by itself; random filler surprises.
Kinds, recipe and sizes as in ``figure2``, at its three larger widths.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bmojo_core.experiments import figure2
from bmojo_core.experiments.command import main
from bmojo_core.experiments.packed import Job
from bmojo_core.experiments.sweep import KINDS, repeats

TASK = {**figure2.TASK, "filler": "random"}
WIDTHS = {"cpu": (), "gpu": (128, 64, 32)}  # nothing of it is small


def jobs(folder: Path, size: str) -> list[Job]:
    """Every kind, width and rate; then the best rates again with other seeds."""
    first = [
        replace(figure2.job(kind, width, lr, 0), task=TASK)
        for width in WIDTHS[size] for kind in KINDS for lr in figure2.RATES
    ]  # fmt: skip
    return first + repeats(first, folder)


if __name__ == "__main__":
    main("figure2_random", jobs, __doc__.splitlines()[0])
