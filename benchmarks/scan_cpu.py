"""Selective scan on the CPU: ours against mambapy's parallel scan, forward and backward.

Both run in this process on the same tensors and alternate, so that a busy machine slows both;
the ratio of the best times is the result. Peak memory is measured one side at a time in a fresh
process each, as the growth of the peak resident size over what the inputs and the loaded
libraries hold (a first run on tiny tensors loads and compiles everything beforehand).

    python benchmarks/scan_cpu.py [--repeats 5] [--output results/benchmark_scan_cpu.json]
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from mambapy.mamba import MambaBlock
from torch import Tensor

from bmojo_core.ops import selective_scan

SIZES = {"b": 64, "l": 256, "d": 128, "n": 16}
TINY = {"b": 2, "l": 16, "d": 16, "n": 16}
Scan = Callable[..., Tensor]


def ours(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """y (b, l, d) by this library."""
    return selective_scan(u, delta, A, B, C, D, backend="cpu")


def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """y (b, l, d) by mambapy's block, which builds its tensors and calls its `pscan`."""
    return MambaBlock.selective_scan(None, u, delta, A, B, C, D)


SIDES: dict[str, Scan] = {"ours": ours, "mambapy": mambapy}


def make_inputs(sizes: dict[str, int], seed: int = 0) -> list[Tensor]:
    """u, delta, A, B, C, D as a freshly initialized Mamba layer sees them, all leaves."""
    b, l, d, n = sizes.values()
    g = torch.Generator().manual_seed(seed)
    delta = torch.exp(torch.rand(b, l, d, generator=g) * 4.6 - 6.9)  # 0.001 to 0.1
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    randn = [torch.randn(*s, generator=g) for s in ((b, l, d), (b, l, n), (b, l, n), (d,))]
    leaves = [randn[0], delta, A, randn[1], randn[2], randn[3]]
    return [t.requires_grad_() for t in leaves]


def forward_backward(scan: Scan, inputs: list[Tensor]) -> tuple[float, float, Tensor, list[Tensor]]:
    """Seconds of the forward pass and of the backward pass, output and gradients."""
    start = time.perf_counter()
    y = scan(*inputs)
    middle = time.perf_counter()
    gradients = torch.autograd.grad(y, inputs, torch.ones_like(y))
    return middle - start, time.perf_counter() - middle, y.detach(), list(gradients)


def disagreement(inputs: list[Tensor]) -> float:
    """Largest difference of outputs and gradients, relative to the largest entry of each."""
    results = [forward_backward(scan, inputs)[2:] for scan in SIDES.values()]
    (y1, g1), (y2, g2) = results
    pairs = zip([y1, *g1], [y2, *g2])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def peak_growth(side: str) -> int:
    """Bytes by which one forward and backward raises this process's peak resident size."""
    forward_backward(SIDES[side], make_inputs(TINY))
    inputs = make_inputs(SIZES)
    before = resident_bytes("VmRSS")
    forward_backward(SIDES[side], inputs)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """Resident size now (VmRSS) or at its peak (VmHWM); only the peak is known outside Linux.

    Not `ru_maxrss` on Linux: a child inherits that from its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines[field].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_growth_in_fresh_process(side: str) -> int:
    """`peak_growth` without what other runs have left behind."""
    command = [sys.executable, __file__, "--peak-of", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(repeats: int) -> dict:
    """The record: best times of both sides, their ratio, peak memory and its ratio."""
    inputs = make_inputs(SIZES)
    record: dict = {"sizes": SIZES, "dtype": "float32", "disagreement": disagreement(inputs)}
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, scan in SIDES.items():
            runs = 1 if side == "mambapy" else 5
            seconds[side] += [forward_backward(scan, inputs)[:2] for _ in range(runs)]
    for side, runs in seconds.items():
        forward, backward = min(run[0] for run in runs), min(run[1] for run in runs)
        total = sorted(map(sum, runs))
        record[side] = {
            "forward_seconds": forward,
            "backward_seconds": backward,
            "best_seconds": total[0],
            "median_seconds": total[len(total) // 2],
            "runs": len(runs),
            "peak_bytes": peak_growth_in_fresh_process(side),
        }
    ours_, theirs = record["ours"], record["mambapy"]
    record["times_faster"] = theirs["best_seconds"] / ours_["best_seconds"]
    record["times_faster_median"] = theirs["median_seconds"] / ours_["median_seconds"]
    record["peak_memory_ratio"] = ours_["peak_bytes"] / theirs["peak_bytes"]
    return record | environment()


def environment() -> dict:
    """What the numbers depend on."""
    packages = ("torch", "numba", "mambapy", "numpy")
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of mambapy")
    parser.add_argument("--output", type=Path, help="where to write the JSON record")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(peak_growth(options.peak_of))
        return
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1")
    record = measure(options.repeats)
    for side in SIDES:
        times = record[side]
        print(
            f"{side:8s} forward {times['forward_seconds']:.3f} s, "
            f"backward {times['backward_seconds']:.3f} s, "
            f"peak {times['peak_bytes'] / 2**20:.0f} MiB"
        )
    print(f"ours is {record['times_faster']:.1f} times faster", end=", ")
    print(f"at {record['peak_memory_ratio']:.3f} of the peak memory")
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
