"""What the generators share: checks of sizes, and which slots of a row hold the same thing.

Symbols: N rows, S slots.
"""

from __future__ import annotations

import numpy as np


def check_integers(at_least: int = 1, **sizes: object) -> None:
    """Refuse what is not an integer or too small.

    Raises
    ------
    ValueError
        Naming the argument, its value and the bound.
    """
    for name, value in sizes.items():
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < at_least:
            raise ValueError(f"{name} must be an integer >= {at_least}, got {value!r}")


def first_occurrence(codes: np.ndarray) -> np.ndarray:
    """For every slot the first slot of its row with the same code; (N, S) -> (N, S).

    Equal codes are neighbours once a row is sorted; the sort is stable, so that the first of a run
    is the earliest slot.
    """
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, axis=1)
    begins = np.ones(codes.shape, bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = np.maximum.accumulate(np.where(begins, np.arange(codes.shape[1]), 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, run, axis=1), axis=1)
    return first
