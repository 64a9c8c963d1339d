"""Trained models that chapters open: figure 2's hard panel in one width, on a laptop's time.

B'MOJO and the hybrid of width 64, as figure 2 has them (64 pairs, L = 256, window 32), at that
figure's best rates for 3000 steps.  Weights and records are kept in results/trained/, a folder a
kind.

    python -m bmojo_core.experiments.trained            both, each half an hour of a CPU core
    python -m bmojo_core.experiments.trained bmojo
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bmojo_core.experiments import figure2
from bmojo_core.experiments.command import results_folder
from bmojo_core.experiments.packed import Job, run_jobs

RATES = {"bmojo": 9e-3, "hybrid": 2.7e-2}


def job(kind: str) -> Job:
    """The run of a kind."""
    one = figure2.job(kind, 64, RATES[kind], 0)
    return replace(one, steps=3000, evaluate_every=1000, tags={"kind": kind})


def main(kinds: list[str], folder: Path) -> None:
    """Train the kinds and keep weights and record of each in ``folder / kind``."""
    for kind in kinds:
        with tempfile.TemporaryDirectory() as made:
            run_jobs([job(kind)], made, weights=made, say=lambda line: print(line, flush=True))
            name, to = job(kind).name, folder / kind
            to.mkdir(parents=True, exist_ok=True)
            for file in ("config.json", "model.safetensors"):
                (to / file).write_bytes((Path(made) / name / file).read_bytes())
            (to / "record.json").write_bytes((Path(made) / f"{name}.json").read_bytes())


if __name__ == "__main__":
    main(sys.argv[1:] or list(RATES), results_folder() / "trained")
