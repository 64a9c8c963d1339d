"""Where a number comes from: versions, machine and time, for the records in results/."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("bmojo", "torch", "transformers", "numpy", "numba", "triton")


def provenance() -> dict[str, Any]:
    """Versions of what computes, and the machine it computes on."""
    return {
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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
