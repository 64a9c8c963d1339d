"""Run the GPU tests and write down what happened on which device.

    python tests/gpu/record.py [--workers 6] [--sanitize] [--output results/gpu_tests.json]
    python tests/gpu/record.py --files test_model_gpu.py --output results/gpu_tests_models.json

With --sanitize small_shapes.py runs too, under compute-sanitizer (memcheck, torch's caching
allocator off), which reports any access outside an allocation.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from bmojo_core.training import provenance

HERE = Path(__file__).parent
STATES = {"failure": "failed", "error": "error", "skipped": "skipped"}


def pytest_command(report: Path, files: list[str], *extra: str) -> list[str]:
    """pytest on this folder, or on files of it, so that no other test's needs stand in the way."""
    options = ["-o", "addopts=", "-p", "no:cacheprovider", f"--confcutdir={HERE}", "-q"]
    chosen = [str(HERE / name) for name in files] or [str(HERE)]
    return [sys.executable, "-m", "pytest", *chosen, *options, f"--junitxml={report}", *extra]


def outcomes(report: Path) -> dict:
    cases = list(ElementTree.parse(report).iter("testcase"))
    tests, messages = {}, {}
    for case in cases:
        state = next((child for child in case if child.tag in STATES), None)
        name = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
        tests[name] = "passed" if state is None else STATES[state.tag]
        if tests[name] in ("failed", "error"):
            messages[name] = state.get("message", "")[:500]
    counts = {state: list(tests.values()).count(state) for state in sorted(set(tests.values()))}
    return dict(counts=counts, tests=tests) | (dict(messages=messages) if messages else {})


def run_tests(workers: int, files: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        report, start = Path(folder) / "report.xml", time.perf_counter()
        spread = ["-n", str(workers)] if workers > 1 else []
        done = subprocess.run(pytest_command(report, files, *spread), check=False)
        seconds = round(time.perf_counter() - start, 1)
        return dict(exit_code=done.returncode, seconds=seconds, **outcomes(report))


def run_sanitizer() -> dict:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return dict(skipped="compute-sanitizer is not on the path")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    command.append(str(HERE / "small_shapes.py"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line or "done" in line]
    failure = {} if done.returncode == 0 else dict(output=(done.stdout + done.stderr)[-3000:])
    return dict(tool="memcheck", exit_code=done.returncode, lines=lines, **failure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--files", nargs="+", default=[], help="of this folder; default: all")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--only-sanitize", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/gpu_tests.json"))
    arguments = parser.parse_args()
    record = provenance() | dict(cuda=torch.version.cuda)
    if not arguments.only_sanitize:
        record["pytest"] = run_tests(arguments.workers, arguments.files)
    if arguments.sanitize or arguments.only_sanitize:
        record["compute_sanitizer"] = run_sanitizer()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({n: {k: v for k, v in x.items() if k != "tests"} if isinstance(x, dict) else x
                      for n, x in record.items()}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
