"""Checks of the exercises of chapter 11: what innovation selects."""

from collections.abc import Callable, Sequence
from itertools import combinations
from math import isclose

import numpy as np


def _algorithm_1(scores: Sequence[float], size: int) -> list[int]:
    """A stable sort by falling score: the first ``size``, oldest first."""
    return sorted(sorted(range(len(scores)), key=lambda t: -scores[t])[:size])


def check_keep(keep: Callable[[Sequence[float], int], Sequence[int]]) -> None:
    """Exercise 1: positions in memory after Algorithm 1 has read all scores, oldest first."""
    assert list(keep([], 3)) == [], "nothing read, nothing remembered"
    assert sorted(keep([2.0, 1.0], 5)) == [0, 1], (
        "while there is room every token is stored, however small its score"
    )
    got = list(keep([3.0, 1.0, 2.0], 2))
    assert got != [1, 2], "you evict the oldest token; evict the one with the smallest score"
    assert got != [0, 1], "the last score, 2, beats the smallest in memory, 1: it must be stored"
    assert sorted(got) == [0, 2], f"scores 3 1 2, two places: positions 0 and 2, not {got}"
    assert got == [0, 2], f"oldest first, please: [0, 2], not {got}"
    got = list(keep([1.0, 5.0, 1.0], 2))
    assert got != [1, 2], "an equal score is not larger: the older token stays (insert if e > min)"
    assert got == [0, 1], f"scores 1 5 1, two places: positions 0 and 1, not {got}"
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = rng.integers(0, 6, rng.integers(1, 15)).astype(float).tolist()
        size = int(rng.integers(1, 6))
        right, got = _algorithm_1(scores, size), list(keep(scores, size))
        hint = ""
        if sorted(scores[t] for t in got) == sorted(scores[t] for t in right):
            hint = "; the scores are right: among equal smallest ones the youngest goes"
        assert got == right, f"keep({scores}, {size}) is {right}, not {got}{hint}"
    print("OK: insert if larger than the smallest, ties keep the older")


def check_both_kept(both_kept: Callable[[int, int], float]) -> None:
    """Exercise 2: the chance that a uniform memory of m of s tokens holds two given ones."""
    assert isclose(both_kept(7, 7), 1.0), "a memory as large as the past holds every pair"
    assert isclose(both_kept(1, 5), 0.0, abs_tol=1e-12), "one place cannot hold two tokens"
    for m, s in ((2, 4), (3, 5), (4, 9)):
        memories = list(combinations(range(s), m))
        right = np.mean([0 in chosen and 1 in chosen for chosen in memories])
        got = both_kept(m, s)
        assert not isclose(got, (m / s) ** 2, rel_tol=1e-9), (
            "(m/s)^2 would hold if the two were kept independently; once one is in, m - 1 places "
            "are left for s - 1 tokens"
        )
        assert not isclose(got, 1 - (1 - m / s) ** 2, rel_tol=1e-9), (
            "that is the chance of at least one, for independent tokens; both are asked for"
        )
        assert isclose(got, right, rel_tol=1e-9), (
            f"of the {len(memories)} memories of {m} among {s} a share {right:.4f} holds both; "
            f"yours is {got:.4f}"
        )
    print("OK: m (m - 1) / (s (s - 1)), about the square of the share for one token")
