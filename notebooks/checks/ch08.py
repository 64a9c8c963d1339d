"""Checks of the exercises of chapter 8: special cases in running models."""

from collections.abc import Callable

import numpy as np
import torch


def check_crossover(crossover: Callable) -> None:
    """Exercise 8.1: ``crossover(e, n, k, g, p)``, the first length at which attention holds more.

    A selective SSM with e channels, n states a channel and k convolution taps against full
    attention with g key-value heads of width p; both count numbers, not bytes.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    for e, n, k, g, p in ((128, 16, 4, 2, 16), (1536, 16, 4, 8, 128), (64, 4, 1, 1, 8)):
        value, case = crossover(e, n, k, g, p), f"e={e}, n={n}, k={k}, g={g}, p={p}"
        state, token = e * n + e * (k - 1), 2 * g * p
        right = state // token + 1
        if k > 1 and value == e * n // token + 1:
            raise AssertionError(f"{case}: the convolution's tail of k - 1 inputs is state, too")
        if k > 1 and value == (e * n + e * k) // token + 1:
            raise AssertionError(f"{case}: k taps need k - 1 past inputs; the k-th is the present")
        if value == state // (g * p) + 1:
            raise AssertionError(f"{case}: a token leaves a key and a value")
        assert value == right, (
            f"{case}: attention holds more from {right} tokens on, not {value}: "
            f"{state} numbers of state against {token} a token"
        )
    print("OK: a Mamba layer's state is worth a dozen to a few dozen tokens of attention's")


def check_half_split(half_split: Callable) -> None:
    """Exercise 8.2: ``half_split(weight, p)`` reorders rows of a query or key projection.

    The rows of every head of width p come as planes (0, 1), (2, 3), ..; wanted is the order in
    which plane i is rows (i, i + p/2).

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    heads, p, d = 3, 8, 5
    rows = torch.arange(heads * p)[:, None].expand(-1, d)
    new = half_split(rows.clone(), p)
    assert tuple(new.shape) == (heads * p, d), f"the shape must stay {(heads * p, d)}"
    order = np.asarray(new[:, 0])
    assert sorted(order.tolist()) == list(range(heads * p)), "every row must come out exactly once"
    within = np.concatenate([np.arange(0, p, 2), np.arange(1, p, 2)])
    right = (np.arange(heads)[:, None] * p + within).ravel()
    inverse = (np.arange(heads)[:, None] * p + np.argsort(within)).ravel()
    if (order == inverse).all():
        raise AssertionError("this is the inverse: it takes (i, i + p/2) to (2i, 2i + 1)")
    if (order == np.concatenate([np.arange(0, heads * p, 2), np.arange(1, heads * p, 2)])).all():
        raise AssertionError("the rows of different heads got mixed: reorder within each head")
    assert (order == right).all(), (
        f"the first head's rows should come from {right[:p].tolist()}, not {order[:p].tolist()}"
    )
    print("OK: all shapes fitted before, too; only the logits knew")
