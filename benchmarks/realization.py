"""`realization` against its peers: python-control (ERA), SIPPY (N4SID), statsmodels (likelihood).

One process, one BLAS thread. Both sides of a comparison take turns on the same data, so that a
busy machine slows both; the ratio of the best times is the result, with the errors beside it.

    python benchmarks/realization.py [--repeats 25] [--output results/benchmark_realization.json]

SIPPY is on PyPI as `sippy_unipi` (the package named `sippy` is a telephony server); it and its
dependencies `casadi`, `tf2ss` and `sympy` are needed for this file only.
"""

# ruff: noqa: E402 (the thread counts must be set before numpy loads)

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before numpy loads its BLAS

import argparse
import importlib.util
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# This file is called like the package it measures: its own folder must not come first.
sys.path[:] = [str(HERE.parent), *(entry for entry in sys.path if Path(entry).resolve() != HERE)]

import numpy as np

from realization import (
    InnovationModel,
    StateSpace,
    StochasticRealization,
    log_likelihood,
    n4sid,
)

PEERS = ("numpy", "scipy", "control", "slycot", "sippy_unipi", "statsmodels")
Call = Callable[[], Any]


def alternate(ours: Call, peer: Call, repeats: int) -> dict[str, float]:
    """Best and median milliseconds of two calls that take turns, and the ratios peer / ours."""
    times: tuple[list[float], list[float]] = ([], [])
    ours(), peer()  # the first call of each loads and allocates
    for _ in range(repeats):
        for call, record in zip((ours, peer), times):
            start = time.perf_counter()
            call()
            record.append(1e3 * (time.perf_counter() - start))
    best, median = [min(t) for t in times], [float(np.median(t)) for t in times]
    return {
        "ours_ms": best[0],
        "peer_ms": best[1],
        "ours_median_ms": median[0],
        "peer_median_ms": median[1],
        "times_faster": best[1] / best[0],
        "times_faster_median": median[1] / median[0],
    }


# --- N4SID against SIPPY --------------------------------------------------------------------------


def random_oscillators(seed: int, n: int = 8, m: int = 2, p: int = 2) -> StateSpace:
    """n / 2 damped oscillators with random frequencies, inputs and outputs."""
    rng = np.random.default_rng(seed)
    A = np.zeros((n, n))
    for k in range(0, n, 2):
        radius, angle = rng.uniform(0.7, 0.95), rng.uniform(0.2, 2.8)
        c, s = radius * np.cos(angle), radius * np.sin(angle)
        A[k : k + 2, k : k + 2] = [[c, s], [-s, c]]
    return StateSpace(
        A,
        rng.standard_normal((n, m)),
        rng.standard_normal((p, n)),
        rng.standard_normal((p, m)),
    )


def identification(repeats: int, systems: int = 20) -> dict[str, Any]:
    """N = 5000, n = 8, two inputs and outputs, 15 block rows, 10 % white measurement noise."""
    from sippy_unipi import system_identification

    N, n, rows = 5000, 8, 15
    errors: dict[str, list[float]] = {"ours": [], "peer": []}
    timing = {}
    for seed in range(systems):
        system = random_oscillators(seed)
        rng = np.random.default_rng(100 + seed)
        u = rng.standard_normal((N, 2))
        clean = system.simulate(u)
        y = clean + 0.1 * clean.std(axis=0) * rng.standard_normal((N, 2))

        def ours(y: np.ndarray = y, u: np.ndarray = u) -> StateSpace:
            return n4sid(y, u, order=n, block_rows=rows).deterministic

        def peer(y: np.ndarray = y, u: np.ndarray = u) -> StateSpace:
            found = system_identification(
                y.T, u.T, "N4SID", SS_f=rows, SS_p=rows, SS_fixed_order=n, SS_D_required=True
            )
            return StateSpace(*(np.asarray(M, float) for M in (found.A, found.B, found.C, found.D)))

        for name, call in (("ours", ours), ("peer", peer)):
            true = system.markov(40)
            difference = np.linalg.norm(call().markov(40) - true)
            errors[name].append(float(difference / np.linalg.norm(true)))
        if seed == 0:
            timing = alternate(ours, peer, repeats)
    ratio = float(np.mean(errors["ours"]) / np.mean(errors["peer"]))
    return {
        "task": f"N4SID, N={N}, n={n}, 2 inputs, 2 outputs, {rows} block rows",
        "peer": "SIPPY",
        "bar": "6 times faster at no larger Markov error (mean over the systems)",
        **timing,
        "systems": systems,
        "markov_error_ours_mean": float(np.mean(errors["ours"])),
        "markov_error_peer_mean": float(np.mean(errors["peer"])),
        "markov_error_ratio_of_means": ratio,
        "markov_error_ours": errors["ours"],
        "markov_error_peer": errors["peer"],
        "met": bool(timing["times_faster"] >= 6 and ratio <= 1),
    }


# --- likelihood against statsmodels ---------------------------------------------------------------


def likelihood(repeats: int) -> dict[str, Any]:
    """100k steps, n = 8, p = 2, stationary start; uncorrelated noises, as statsmodels has them."""
    from statsmodels.tsa.statespace.kalman_filter import KalmanFilter

    T, n, p = 100_000, 8, 2
    base = random_oscillators(0)
    rng = np.random.default_rng(1)
    W = rng.standard_normal((n, n))
    model = StochasticRealization(base.A, base.C, W @ W.T / n, np.eye(p))
    y = model.simulate(T, seed=2)
    kalman = KalmanFilter(k_endog=p, k_states=n, k_posdef=n)
    kalman.bind(y.copy())
    kalman["design"], kalman["transition"], kalman["selection"] = model.C, model.A, np.eye(n)
    kalman["state_cov"], kalman["obs_cov"] = model.Q, model.R
    kalman.initialize_stationary()
    timing = alternate(lambda: log_likelihood(model, y), kalman.loglike, repeats)
    ours, peer = log_likelihood(model, y), kalman.loglike()
    difference = abs(ours / peer - 1)
    return {
        "task": f"log-likelihood of {T} steps, n={n}, p={p}",
        "peer": "statsmodels",
        "bar": "1.5 times faster, equal to 1e-9 relative",
        **timing,
        "ours_us_per_step": 1e3 * timing["ours_ms"] / T,
        "peer_us_per_step": 1e3 * timing["peer_ms"] / T,
        "relative_difference": difference,
        "met": bool(timing["times_faster"] >= 1.5 and difference <= 1e-9),
    }


def innovation_likelihood(repeats: int) -> dict[str, Any]:
    """The same for an innovation model from a known state: no transient, constant gain."""
    from statsmodels.tsa.statespace.kalman_filter import KalmanFilter

    T, base = 100_000, random_oscillators(0)
    K = 0.1 * np.random.default_rng(3).standard_normal((8, 2))
    model = InnovationModel(base.A, K, base.C, np.eye(2))
    y = model.simulate(T, seed=4, x0=np.zeros(8))
    # w = K e and v = e are correlated: statsmodels needs e in its state, with no output noise.
    kalman = KalmanFilter(k_endog=2, k_states=10, k_posdef=2)
    kalman.bind(y.copy())
    kalman["design"] = np.hstack([model.C, np.eye(2)])
    kalman["transition"] = np.block([[model.A, K], [np.zeros((2, 10))]])
    kalman["selection"] = np.vstack([np.zeros((8, 2)), np.eye(2)])
    kalman["state_cov"] = np.eye(2)
    start = np.zeros((10, 10))
    start[8:, 8:] = np.eye(2)
    kalman.initialize_known(np.zeros(10), start)
    timing = alternate(lambda: log_likelihood(model, y, x0=np.zeros(8)), kalman.loglike, repeats)
    difference = abs(log_likelihood(model, y, x0=np.zeros(8)) / kalman.loglike() - 1)
    return {
        "task": f"log-likelihood of {T} steps of an innovation model, n=8, p=2, known start",
        "peer": "statsmodels",
        **timing,
        "ours_us_per_step": 1e3 * timing["ours_ms"] / T,
        "relative_difference": difference,
    }


# --- ERA against python-control -------------------------------------------------------------------


def hankel() -> Any:
    """`realization_hankel.run()`, from the file beside this one."""
    spec = importlib.util.spec_from_file_location(
        "realization_hankel", HERE / "realization_hankel.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    default = HERE.parent / "results" / "benchmark_realization.json"
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' deprecations
    result = {
        "identification": identification(arguments.repeats),
        "likelihood": likelihood(arguments.repeats),
        "innovation_likelihood": innovation_likelihood(arguments.repeats),
        "hankel": hankel(),
        "versions": {"python": platform.python_version()} | {k: version(k) for k in PEERS},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "blas_threads": 1},
        "command": "python benchmarks/realization.py",
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("identification", "likelihood", "innovation_likelihood"):
        part = result[name]
        print(f"{part['task']}: {part['times_faster']:.1f} times {part['peer']}")


if __name__ == "__main__":
    main()
