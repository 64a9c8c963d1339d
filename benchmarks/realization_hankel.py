"""Ho-Kalman (ERA) against python-control, and minimal realizations, in one process on one thread.

Three Hankel matrices of order 20 without noise: 500 x 500 with one input and output, 501 x 501 and
1500 x 1500 with three of each. The error is the largest difference of any Markov parameter used,
relative to the largest. Both programs get the same parameters and the same order, and take turns.

`run()` returns the record; as a script it also writes results/benchmark_hankel.json:

    python benchmarks/realization_hankel.py results/benchmark_hankel.json
"""

# ruff: noqa: E402 (the thread counts must be set before numpy loads)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # read when numpy is loaded, so it must be set before

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
# realization.py beside this file is called like the package: its folder must not come first.
sys.path[:] = [str(HERE.parent), *(entry for entry in sys.path if Path(entry).resolve() != HERE)]

import control
import numpy as np
import scipy

from realization import StateSpace, ho_kalman, minimal

ORDER = 20
CASES = {"500x500, 1x1": (500, 1), "501x501, 3x3": (167, 3), "1500x1500, 3x3": (500, 3)}


def oscillators(seed: int, n: int, ports: int) -> StateSpace:
    """n / 2 damped oscillations, all reached and seen by every port."""
    rng = np.random.default_rng(seed)
    A = np.zeros((n, n))
    for i in range(0, n, 2):
        r, angle = rng.uniform(0.7, 0.98), rng.uniform(0.1, 3.0)
        c, s = r * np.cos(angle), r * np.sin(angle)
        A[i : i + 2, i : i + 2] = [[c, s], [-s, c]]
    return StateSpace(
        A,
        rng.standard_normal((n, ports)),
        rng.standard_normal((ports, n)),
        rng.standard_normal((ports, ports)),
    )


def take_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the calls alternating so that a busy machine slows all alike."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def hankel_case(blocks: int, ports: int, repeats: int) -> dict[str, float]:
    """Times and errors of one Hankel matrix of blocks x blocks block entries."""
    markov = oscillators(0, ORDER, ports).markov(2 * blocks + 1)
    columns_last = np.ascontiguousarray(np.moveaxis(markov, 0, 2))
    calls = {
        "ho_kalman": lambda: ho_kalman(markov, ORDER),
        "control": lambda: control.eigensys_realization(columns_last, ORDER, m=blocks, n=blocks)[0],
    }
    seconds = take_turns(calls, repeats)
    record = {}
    for name, call in calls.items():
        result = call()
        result = StateSpace(result.A, result.B, result.C, result.D)
        error = np.abs(result.markov(len(markov)) - markov).max() / np.abs(markov).max()
        record[f"{name}_ms"] = 1e3 * float(np.median(seconds[name]))
        record[f"{name}_best_ms"] = 1e3 * min(seconds[name])
        record[f"{name}_error"] = float(error)
    pairs = zip(seconds["control"], seconds["ho_kalman"])
    record["times_faster"] = float(np.median([theirs / ours for theirs, ours in pairs]))
    return record


def redundant(seed: int, condition: float) -> StateSpace:
    """Order 40, 10 unreachable and 5 unobservable states, in a basis of the given condition."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((40, 40))
    A[30:, :30] = A[:25, 25:30] = A[30:, 25:30] = 0
    A *= 0.95 / np.abs(np.linalg.eigvals(A)).max()
    B, C = rng.standard_normal((40, 2)), rng.standard_normal((2, 40))
    B[30:], C[:, 25:30] = 0, 0
    U, V = (np.linalg.qr(rng.standard_normal((40, 40)))[0] for _ in range(2))
    sys = StateSpace(A, B, C, np.zeros((2, 2)))
    return sys.transform(U * np.logspace(0, np.log10(condition), 40) @ V)


def minimal_case(condition: float, repeats: int, systems: int = 20) -> dict[str, object]:
    """How often the order is 25 at the default tolerance, and how long it takes."""
    found = [minimal(redundant(seed, condition)).n for seed in range(systems)]
    sys = redundant(0, condition)
    plant = control.ss(sys.A, sys.B, sys.C, sys.D, True)
    theirs = [
        control.minreal(control.ss(s.A, s.B, s.C, s.D, True), verbose=False).nstates
        for s in (redundant(seed, condition) for seed in range(systems))
    ]
    calls = {
        "minimal": lambda: minimal(sys),
        "control": lambda: control.minreal(plant, verbose=False),
        "eig": lambda: np.linalg.eig(sys.A),
    }
    seconds = take_turns(calls, repeats)
    return {
        "systems": systems,
        "minimal_right": sum(n == 25 for n in found),
        "control_right": sum(n == 25 for n in theirs),
        **{f"{name}_ms": 1e3 * float(np.median(s)) for name, s in seconds.items()},
        **{f"{name}_best_ms": 1e3 * min(s) for name, s in seconds.items()},
    }


def simulate_case(repeats: int) -> dict[str, float]:
    """A million steps of an order-8 system with two inputs and outputs."""
    sys = oscillators(1, 8, 2)
    u = np.random.default_rng(0).standard_normal((1_000_000, 2))
    seconds = take_turns({"simulate": lambda: sys.simulate(u)}, repeats)["simulate"]
    return {"seconds": float(np.median(seconds)), "best_seconds": min(seconds)}


def run(repeats: int = 7) -> dict[str, object]:
    """The whole record, as plain dictionaries."""
    return {
        "order": ORDER,
        "hankel": {name: hankel_case(*case, repeats) for name, case in CASES.items()},
        "minimal_order_40": {
            f"{condition:.0e}": minimal_case(condition, 5 * repeats) for condition in (1e2, 1e4)
        },
        "simulate_1e6_steps_order_8": simulate_case(repeats),
        "provenance": {
            "threads": 1,
            "repeats": repeats,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "control": control.__version__,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
    }


def main() -> None:
    """Write the record to the path given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="where the JSON record goes")
    record = run()
    path = parser.parse_args().path
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
