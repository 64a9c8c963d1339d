"""Checks of the exercises of chapter 30: throughput."""

from collections.abc import Callable


def check_visible_pairs(visible_pairs: Callable) -> None:
    """Exercise 30.1: ``visible_pairs(l, w)``, queries times the keys each sees, its own included.

    Causal attention over a window of w inputs, for a sequence of l.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    for l, w in ((1, 1), (5, 2), (7, 7), (9, 20), (600, 512)):
        value, case = visible_pairs(l, w), f"l={l}, w={w}"
        right = sum(min(t + 1, w) for t in range(l))
        if w > 1 and value == l * w:
            raise AssertionError(f"{case}: the first w - 1 queries have no w inputs behind them")
        if value == sum(min(t, w) for t in range(l)):
            raise AssertionError(f"{case}: a query sees its own input, too")
        if w > l and value == w * (w + 1) // 2 + (l - w) * w:
            raise AssertionError(f"{case}: a window longer than the sequence sees no more than it")
        assert value == right, f"{case}: there are {right} pairs, not {value}"
    print("OK: linear in l beyond the window, quadratic inside it")


def check_crossing(crossing: Callable) -> None:
    """Exercise 30.2: ``crossing(base, slope, flat)``, the length at which two costs are equal.

    One model takes ``base + slope l`` a token at length l, the other ``flat``.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    for base, slope, flat in ((4.0, 0.5, 6.0), (5.0, 0.001, 7.5), (2.0, 1.0, 2.0)):
        value, case = crossing(base, slope, flat), f"base={base}, slope={slope}, flat={flat}"
        right = (flat - base) / slope
        if right and abs(value - flat / slope) < 1e-9 * right:
            raise AssertionError(f"{case}: at length 0 the first model already costs its base")
        if right and abs(value + right) < 1e-9 * right:
            raise AssertionError(f"{case}: the sign is wrong; the flat model begins as the dearer")
        assert abs(value - right) <= 1e-9 * max(1.0, right), (
            f"{case}: the costs are equal at {right:g}, not at {value:g}"
        )
    assert crossing(5.0, 1.0, 3.0) == 0, "a model that is cheaper from the start crosses at 0"
    print("OK: the crossing moves with the gap of the flat parts, over the price of a key")
