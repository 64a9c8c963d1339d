"""Checks of the exercises of chapter 12: five synthetic tasks."""

from collections.abc import Callable, Sequence, Set
from math import isclose

Remembered = tuple[dict[int, int], int]


def check_window_ceiling(window_ceiling: Callable[[Sequence[int], int, int], float]) -> None:
    """Exercise 1: the share within reach, and one guess in so many beyond it."""
    assert isclose(window_ceiling([1, 2, 3], 9, 7), 1.0), "all answers in reach: accuracy 1"
    got = window_ceiling([10, 20], 5, 4)
    assert not isclose(got, 0.0, abs_tol=1e-12), "beyond reach a guess is still right sometimes"
    assert isclose(got, 0.25), f"nothing in reach, four values: one guess in four, not {got:.4f}"
    got = window_ceiling([4, 5, 6, 7], 5, 10**9)
    assert not isclose(got, 0.5, abs_tol=1e-6), (
        "the last 5 inputs lie 0 to 4 steps back: 5 steps back is out of reach"
    )
    assert isclose(got, 0.25, abs_tol=1e-6), f"one of four answers is in reach, not {got:.4f}"
    got = window_ceiling([1, 9], 5, 2)
    assert not isclose(got, 1.0), (
        "1/M applies to the answers beyond reach only: p + (1 - p) / M, not p + 1 / M"
    )
    assert isclose(got, 0.75), f"half in reach, half guessed among two: 0.75, not {got:.4f}"
    print("OK: p + (1 - p) / M")


def check_remember(remember: Callable[[list[int], Set[int], Set[int]], Remembered]) -> None:
    """Exercise 2: noisy recall in one pass; keys 1, 2, values 5, 6, noise 9."""
    keys, values = {1, 2}, {5, 6}

    def run(row: list[int]) -> Remembered:
        said, places = remember(row, keys, values)
        return dict(said), places

    said, places = run([])
    assert (said, places) == ({}, 0), "nothing read, nothing said, nothing remembered"
    said, _ = run([1, 5])
    assert 0 not in said, "a key that comes for the first time has no value yet: say nothing"
    said, _ = run([1, 5, 1])
    assert said == {2: 5}, f"key 1 had value 5 and comes again at position 2: {{2: 5}}, not {said}"
    said, places = run([1, 5, 9, 9, 2, 6, 9, 9, 2])
    assert said == {8: 6}, f"noise is neither key nor value: {{8: 6}}, not {said}"
    assert run([1, 9, 5, 1]) == ({}, 0), (
        "only a value that follows its key at once is that key's: 9 is noise, and 5 follows noise"
    )
    assert places <= 2, f"two different keys need two places, yours took {places}: is noise stored?"
    said, _ = run([1, 5, 1, 6, 1])
    assert said.get(4) != 6, "a key keeps its first value; yours takes the latest"
    assert said == {2: 5, 4: 5}, f"both repetitions must be answered by 5, not {said}"
    _, places = run([1, 5] * 10)
    assert places == 1, f"one different key, one place; yours took {places}"
    print("OK: one entry for every different key")
