"""CUDA kernels without barriers, run by the C++ compiler on the CPU, thread after thread.

``Emulated`` takes the place of a loaded module of ``ops/_nvrtc.py``: the same source, the same
defines, the same launch, so that a kernel and the code that calls it are tested without a GPU.
Times and races it does not show; undefined behaviour stops it (``-fsanitize=undefined``).
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

HERE, OPS = Path(__file__).parent, Path(__file__).parents[2] / "bmojo_core/ops"
COMPILER = shutil.which("g++") or shutil.which("clang++")
CALLER = """
extern "C" void {kernel}_on_cpu(const Params* p, unsigned blocks, unsigned threads) {{
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {kernel}(*p);
}}
"""


@dataclass(frozen=True)
class Emulated:
    """Kernels of one source with one set of defines."""

    library: ctypes.CDLL

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, shared: int,
        params: ctypes.Structure,
    ) -> None:  # fmt: skip
        """Every thread of every block, in order."""
        assert grid[1:] == (1, 1) and shared == 0
        getattr(self.library, f"{kernel}_on_cpu")(ctypes.byref(params), grid[0], threads)


@lru_cache(maxsize=64)
def compiled(path: str, kernels: tuple[str, ...], defines: tuple[tuple[str, str], ...]) -> Emulated:
    """A source of ``bmojo_core/ops``, for the CPU."""
    text = '#include "cuda_on_cpu.h"\n' + (OPS / path).read_text(encoding="utf-8")
    text += "".join(CALLER.format(kernel=kernel) for kernel in kernels)
    name = hashlib.sha256(repr((text, defines)).encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / f"{name}.cpp", Path(folder) / f"{name}.so"
        source.write_text(text, encoding="utf-8")
        macros = [f"-D{name}={value}" for name, value in defines]
        checks = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
        command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *checks, *macros]
        subprocess.run([*command, f"-I{HERE}", str(source), "-o", str(library)], check=True)
        return Emulated(ctypes.CDLL(str(library)))


def poisoned(*shape: int, dtype: torch.dtype, **_: object) -> torch.Tensor:
    """``torch.empty`` whose content shows where nothing has written."""
    return torch.full(shape, float("nan"), dtype=dtype)
