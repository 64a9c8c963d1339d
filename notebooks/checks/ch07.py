"""Checks of the exercises of chapter 7: the canonical form of an input-varying system."""

from collections.abc import Callable, Iterable

import numpy as np


def check_offsets(offsets: Iterable[int]) -> None:
    """Exercise 7.1: which u_{t+k} the coefficient a_2(t) of an order-3 system depends on.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    offsets = set(offsets)
    assert all(k == round(k) for k in offsets), "k counts tokens: every k is a whole number"
    if offsets == {0}:
        raise AssertionError("that is the frozen form, a_2(u_t): the exact one sees more")
    if offsets == set(range(-3, 3)):
        raise AssertionError("those are the tokens of the whole row; a_2 alone uses fewer of them")
    if offsets == set(range(-3, 1)):
        raise AssertionError("that is alpha_2(t), the causal column; a_2(t) = alpha_2(t + 1)")
    assert len(offsets) == 4, f"each coefficient depends on n + 1 = 4 tokens, not {len(offsets)}"
    assert offsets == {-2, -1, 0, 1}, "shift the window u_{t-3} .. u_t of alpha_2 by i - 1 = 1"
    print("OK: a_2(t) depends on u_{t-2} .. u_{t+1}")


def check_order_one_window_form(row: Callable) -> None:
    """Exercise 7.2: ``row(a, b, c, d, t) -> (theta, phi)``.

    The row of y_t = theta v_{t-1} + phi y_{t-1} + d_t v_t.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    rng = np.random.default_rng(0)
    a, b, c, d, v = rng.uniform(0.5, 1.5, size=(5, 12))
    x, y = 0.7, []
    for t in range(12):
        y.append(c[t] * x + d[t] * v[t])
        x = a[t] * x + b[t] * v[t]
    wrong_phi, wrong_theta = 0.0, 0.0
    for t in range(1, 12):
        theta, phi = (float(value) for value in row(a, b, c, d, t))
        true_phi = c[t] * a[t - 1] / c[t - 1]
        wrong_phi = max(wrong_phi, abs(phi - true_phi))
        wrong_theta = max(wrong_theta, abs(theta - (c[t] * b[t - 1] - true_phi * d[t - 1])))
        if abs(phi - a[t]) < 1e-12:
            raise AssertionError(
                "phi = a_t is the frozen pole: the state is read by c_{t-1}, then c_t"
            )
        if abs(theta - c[t] * b[t - 1]) < 1e-12:
            raise AssertionError(
                "theta misses a term: y_{t-1} already holds d_{t-1} v_{t-1}, which phi multiplies"
            )
    assert wrong_phi < 1e-9, "phi must carry the state from y_{t-1} to y_t: c_t a_{t-1} / c_{t-1}"
    assert wrong_theta < 1e-9, "theta must be what v_{t-1} adds to y_t beyond phi y_{t-1}"
    print("OK: the pair (v_{t-1}, y_{t-1}) is a state, and its row is causal")
