"""The command line shared by the sweeps: ``python -m bmojo_core.experiments.<id> [options]``.

A sweep is a list of jobs.  Runs leave one record each in ``results/runs/<id>/``; when all are
there (or with ``--collect``) they are put together in ``results/<id>.json``.  Sweeps of two sizes
(``--size cpu`` or ``gpu``) keep both in the same places.  Where the records decide what is to be
repeated, a sweep goes on until nothing is missing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bmojo_core.experiments.packed import Job, load_records, run_jobs
from bmojo_core.training import write_json

Jobs = Callable[[Path, str], list[Job]]
SIZES = ("cpu", "gpu")


def main(name: str, jobs: Jobs, description: str) -> None:
    """Run the missing jobs of a sweep of two sizes, or collect its records.

    ``jobs(folder, size)`` lists what the records in ``folder`` let be known.
    """
    parser = _parser(name, description)
    parser.add_argument("--size", choices=SIZES, default="cpu", help="of tasks and models")
    arguments = parser.parse_args()
    folder = Path(arguments.results) / "runs" / name
    begun = time.perf_counter()
    while True:
        listed = jobs(folder, arguments.size)
        ran = _run(name, listed, arguments, arguments.seconds - (time.perf_counter() - begun))
        if not ran:
            break
    if not arguments.list:
        both = [job for size in SIZES for job in jobs(folder, size)]
        collect(name, both, arguments.results)


def command(name: str, jobs: list[Job], description: str) -> None:
    """Run a sweep's missing jobs, or collect its records."""
    arguments = _parser(name, description).parse_args()
    _run(name, jobs, arguments, arguments.seconds)
    if not arguments.list:
        collect(name, jobs, arguments.results)


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m bmojo_core.experiments.{name}", description=description
    )
    parser.add_argument("--results", default="results", help="folder of the records")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--together", type=int, default=16, help="runs that share the device")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th job, from the i-th")
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    parser.add_argument("--list", action="store_true", help="say what is missing and stop")
    parser.add_argument("--collect", action="store_true", help="write results/<id>.json and stop")
    return parser


def _run(name: str, jobs: list[Job], arguments: argparse.Namespace, seconds: float) -> int:
    """Run what is missing of the chosen jobs; returns how many ran."""
    folder = Path(arguments.results) / "runs" / name
    part, of = (int(x) for x in arguments.shard.split("/"))
    chosen = [job for job in jobs if arguments.only in job.name][part::of]
    missing = [job for job in chosen if not (folder / f"{job.name}.json").exists()]
    print(f"{name}: {len(jobs)} jobs, {len(chosen)} here, {len(missing)} to run", flush=True)
    if arguments.list:
        print("\n".join(job.name for job in missing))
    if arguments.list or arguments.collect:
        return 0
    return run_jobs(
        missing, folder, device=arguments.device, together=arguments.together,
        seconds=seconds, say=lambda line: print(line, flush=True),
    )  # fmt: skip


def collect(name: str, jobs: list[Job], results: str | Path) -> Path:
    """All records of the sweep's present jobs in one file; says how many are missing."""
    folder = Path(results) / "runs" / name
    wanted = {job.name for job in jobs}
    records = [r for r in load_records(folder) if Job(**r["job"]).name in wanted]
    path = Path(results) / f"{name}.json"
    write_json(path, {"experiment": name, "jobs": len(jobs), "runs": records})
    print(f"{path}: {len(records)} of {len(jobs)} runs")
    return path
