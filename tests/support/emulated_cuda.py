"""CUDA kernels, run by the C++ compiler on the CPU: the threads of a block take turns.

``load`` takes the place of the one of ``ops/_nvrtc.py``: the same source, the same defines, the
same launch, so that a kernel and the code that calls it are tested without a GPU. Times it does
not show, and races only where the order of turns meets them; undefined behaviour stops it
(``-fsanitize=undefined``), and so do threads that wait for each other for ever.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bmojo_core.ops import _nvrtc

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(.*?\)\s+)?(\w+)\(')
CALLER = """
static const Params* {kernel}_params;
static void {kernel}_body() {{ {kernel}(*{kernel}_params); }}
extern "C" __attribute__((visibility("default"))) int {kernel}_on_cpu(
    const Params* p, unsigned x, unsigned y, unsigned z, unsigned threads) {{
  {kernel}_params = p;
  return on_cpu::run_grid({kernel}_body, x, y, z, threads);
}}
"""
# Pointers that are never followed may be anything (absent tensors); to follow one to nowhere ends
# the process unasked; the size of shared memory is not its array's, so that bound says nothing.
CHECKS = (
    "-fsanitize=undefined", "-fno-sanitize=pointer-overflow,null,object-size",
    "-fsanitize-undefined-trap-on-error",
)  # fmt: skip
# Jumps from stack to stack are no mistake; two libraries' variables of one name are two.
OPTIONS = (
    "-std=c++17", "-O0", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-fvisibility=hidden",
)  # fmt: skip
MOST_SHARED, MOST_THREADS = 227 * 1024, 512  # bytes and threads of a block, as in the header


@dataclass(frozen=True)
class Emulated:
    """Kernels of one source with one set of defines."""

    library: ctypes.CDLL

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, shared: int,
        params: ctypes.Structure,
    ) -> None:  # fmt: skip
        """Every block, in order; the threads of one as far as they get, turn after turn."""
        assert shared <= MOST_SHARED and threads <= MOST_THREADS
        run = getattr(self.library, f"{kernel}_on_cpu")
        assert run(ctypes.byref(params), *grid, threads), f"{kernel} waits for ever"


@lru_cache(maxsize=256)
def load(source: str, defines: tuple[tuple[str, str], ...], _device: int | None) -> Emulated:
    """A source that begins with ``_intrinsics.cu``, for the CPU; see ``_nvrtc.load``."""
    kernels = source.removeprefix(_nvrtc.read_source("_intrinsics.cu"))
    assert kernels != source
    text = '#include "cuda_on_cpu.h"\n' + kernels
    text += "".join(CALLER.format(kernel=kernel) for kernel in KERNEL.findall(kernels))
    name = hashlib.sha256(repr((text, defines)).encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as folder:
        file, library = Path(folder) / f"{name}.cpp", Path(folder) / f"{name}.so"
        file.write_text(text, encoding="utf-8")
        macros = [f"-D{name}={value}" for name, value in defines]
        command = [COMPILER, *OPTIONS, *CHECKS, *macros, f"-I{HERE}", str(file)]
        subprocess.run([*command, "-o", str(library)], check=True)
        return Emulated(ctypes.CDLL(str(library)))


@contextmanager
def small_chip(gpu: ModuleType) -> Iterator[pytest.MonkeyPatch]:
    """An operation's host code takes the CPU for a chip of one multiprocessor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu._nvrtc, "load", load)
        patch.setattr(gpu, "_multiprocessors", lambda _: 1)
        patch.setattr(gpu, "_require_cuda", lambda _: None)
        yield patch


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """The relative error."""
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-12)).item()


def poisoned(*shape: int, dtype: torch.dtype, **_: object) -> torch.Tensor:
    """``torch.empty`` whose content shows where nothing has written."""
    return torch.full(shape, float("nan"), dtype=dtype)
