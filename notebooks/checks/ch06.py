"""Checks of the exercises of chapter 6: Mamba is diagonal."""

from collections.abc import Callable

import numpy as np


def check_step_for_span(delta: float) -> None:
    """Exercise 6.1: the constant step that leaves 1 % of a token after 512 tokens, A = -1.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    delta = float(delta)
    assert delta > 0, "a step is positive"
    left = np.exp(-512 * delta)
    if abs(np.exp(-delta) - 0.01) < 1e-3:
        raise AssertionError("this forgets 99 % in one token: the 512 steps multiply")
    if any(abs(count * delta - np.log(100)) < 1e-6 for count in (511, 513)):
        raise AssertionError("count the steps: 512 more tokens are 512 steps, not 511 or 513")
    assert abs(left - 0.01) < 5e-5, (
        f"with this step exp(-512 Delta) = {left:.4g} of the token is left, not 0.01"
    )
    print("OK: exp(-512 Delta) = 0.01")


def check_tustin(tustin: Callable) -> None:
    """Exercise 6.2: ``tustin(z)``, the trapezoid's approximation of exp(z) for z = Delta A.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    z = -np.array([0.2, 0.1, 0.05])
    value = np.asarray(tustin(z), dtype=float)
    assert value.shape == z.shape, "tustin must work entry by entry on arrays"
    error = np.abs(value - np.exp(z))
    if error.max() < 1e-12:
        raise AssertionError("that is exp itself: give the rational approximation")
    order = np.log2(error[:-1] / np.maximum(error[1:], 1e-300))
    if np.all(np.abs(order - 2) < 0.3):
        raise AssertionError(
            "the error of one step falls by 4 when the step is halved: that is the Euler step "
            "1 + z (or 1 / (1 - z)). The trapezoid's falls by 8."
        )
    assert np.all(np.abs(order - 3) < 0.3), (
        "the error of one step must fall by 2^3 when the step is halved; "
        f"it falls by 2^{order[0]:.2g}"
    )
    big = np.abs(np.asarray(tustin(-np.array([1.0, 10.0, 1e4])), dtype=float))
    assert np.all(big < 1), "the trapezoid is stable for every step: |tustin(z)| < 1 for z < 0"
    assert np.isclose(np.asarray(tustin(np.array([-1.0])), dtype=float)[0], 1 / 3), (
        "third order and stable, but not the trapezoid: solve "
        "x_{t+1} - x_t = z/2 (x_{t+1} + x_t) for x_{t+1}"
    )
    print("OK: third order a step, stable for every Delta")
