"""Where a number comes from: versions, machine and time, for the records in results/."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("bmojo", "torch", "transformers", "numpy", "numba", "triton")


def provenance() -> dict[str, Any]:
    """Versions of what computes, and the machine it computes on.

    ``commit`` is the last that changed this package, where it runs from a checkout; a copy without
    its history is told by the environment's ``BMOJO_COMMIT``.
    """
    return {
        "commit": os.environ.get("BMOJO_COMMIT") or _commit(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


@lru_cache(maxsize=1)
def _commit() -> str | None:
    package = Path(__file__).parents[1]
    command = ["git", "-C", str(package), "log", "-1", "--format=%h", "--", "."]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
