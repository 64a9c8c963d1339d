"""The command line shared by the sweeps: ``python -m bmojo_core.experiments.<id> [options]``.

A sweep is a list of jobs.  Runs leave one record each in ``results/runs/<id>/``; when all are
there (or with ``--collect``) they are put together in ``results/<id>.json``.  Sweeps of two sizes
(``--size cpu`` or ``gpu``) keep both in the same places.  Where the records decide what is to be
repeated, a sweep goes on until nothing is missing.

``results/`` is the checkout's own where the package runs from one, whatever folder the command is
given in, else one in the working directory.
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
PACKAGE = Path(__file__).parents[1]
LOCAL = "results"


def main(name: str, jobs: Jobs, description: str) -> None:
    """Run the missing jobs of a sweep of two sizes, or collect its records.

    ``jobs(folder, size)`` lists what the records in ``folder`` let be known.
    """
    parser = _parser(name, description)
    parser.add_argument("--size", choices=SIZES, default="cpu", help="of tasks and models")
    arguments = parser.parse_args()
    arguments.results = arguments.results or str(results_folder())
    folder = Path(arguments.results) / "runs" / name
    if not arguments.collect and not jobs(folder, arguments.size):  # both sizes are collected
        filled = [size for size in SIZES if jobs(folder, size)]
        parser.error(
            f"argument --size: must be a size of which {name} has jobs ({', '.join(filled)}), "
            f"got {arguments.size!r}"
        )
    begun = time.perf_counter()
    while True:
        listed = jobs(folder, arguments.size)
        left = arguments.seconds - (time.perf_counter() - begun)
        if not _run(parser, name, listed, arguments, left):
            break
    if not arguments.list:
        both = [job for size in SIZES for job in jobs(folder, size)]
        collect(name, both, arguments.results)


def command(name: str, jobs: Callable[[str], list[Job]], description: str) -> None:
    """Run a sweep's missing jobs, or collect its records.

    ``jobs(results)`` lists what the records in that folder let be known.
    """
    parser = _parser(name, description)
    arguments = parser.parse_args()
    arguments.results = arguments.results or str(results_folder())
    listed = jobs(arguments.results)
    _run(parser, name, listed, arguments, arguments.seconds)
    if not arguments.list:
        collect(name, listed, arguments.results)


def results_folder(package: Path = PACKAGE) -> Path:
    """The ``results/`` of the checkout that the package runs from, else that of this folder."""
    checkout = package.parent
    own = checkout / LOCAL
    return own if own.is_dir() and (checkout / "pyproject.toml").is_file() else Path(LOCAL)


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m bmojo_core.experiments.{name}", description=description
    )
    parser.add_argument("--results", help="folder of the records (the checkout's, or ./results)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--together", type=int, default=16, help="runs that share the device")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after")
    parser.add_argument(
        "--shard", type=_shard, default="0/1", help="i/n: every n-th job, from the i-th of 0..n-1"
    )
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    parser.add_argument("--list", action="store_true", help="say what is missing and stop")
    parser.add_argument("--collect", action="store_true", help="write results/<id>.json and stop")
    return parser


def _shard(text: str) -> tuple[int, int]:
    """(i, n) of ``"i/n"``."""
    part, _, of = text.partition("/")
    if not (part.isdecimal() and of.isdecimal() and int(part) < int(of)):
        raise argparse.ArgumentTypeError(f"must be i/n with 0 <= i < n, got {text!r}")
    return int(part), int(of)


def _run(
    parser: argparse.ArgumentParser,
    name: str,
    jobs: list[Job],
    arguments: argparse.Namespace,
    seconds: float,
) -> int:
    """Run what is missing of the chosen jobs; returns how many ran."""
    folder = Path(arguments.results) / "runs" / name
    named = [job for job in jobs if arguments.only in job.name]
    if arguments.only and not named:
        such = f", such as {jobs[0].name}" if jobs else ""
        parser.error(
            f"argument --only: must be part of a job's name{such}; none of {len(jobs)} jobs is "
            f"named so, got {arguments.only!r}"
        )
    part, of = arguments.shard
    chosen = named[part::of]
    missing = [job for job in chosen if not (folder / f"{job.name}.json").exists()]
    print(f"{name}: {len(jobs)} jobs, {len(chosen)} here, {len(missing)} to run", flush=True)
    print(f"records in {folder}", flush=True)
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
