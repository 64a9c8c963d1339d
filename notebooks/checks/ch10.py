"""Checks of the exercises of chapter 10: recall and the memory budget."""

from collections.abc import Callable
from math import comb, factorial, isclose, log2


def check_pairs_to_carry(pairs_to_carry: Callable[..., float]) -> None:
    """Exercise 1: bits for the pairs that the window does not show."""
    nothing = pairs_to_carry(8, 8)
    assert isclose(nothing, 0.0, abs_tol=1e-9), (
        f"when the window shows every pair the state need carry nothing, not {nothing:.3g} bits"
    )
    whole = pairs_to_carry(5, 0, M=9)
    exact = log2(factorial(9) / factorial(4))
    assert isclose(whole, exact, rel_tol=1e-9), (
        f"without a window, 5 of 9 values in order are log2(9!/4!) = {exact:.3f} bits, "
        f"not {whole:.3f}"
    )
    part = pairs_to_carry(3, 1, M=4)
    assert not isclose(part, log2(4 * 3), rel_tol=1e-6), (
        "the value in sight cannot be drawn again: only M - seen values are left for the others"
    )
    assert isclose(part, log2(3 * 2), rel_tol=1e-9), (
        f"2 hidden values among the 3 left: log2(6) = {log2(6):.3f} bits, not {part:.3f}"
    )
    print("right: the window's pairs are free, and they also narrow the choice of the others")


def check_bits_per_byte(
    useful_share: Callable[[int, int, float], float],
    bits_needed: Callable[[int, float], float],
) -> None:
    """Exercise 2: share of the carried bits that must be information."""
    share = useful_share(1000, 64, 1.0)
    assert share <= 1, f"a share is at most 1, got {share:.3g}: are bytes and bits mixed up?"
    expected = bits_needed(64, 1.0) / 8000
    assert not isclose(share, 8 * expected, rel_tol=1e-6), "1000 bytes are 8000 bits"
    assert isclose(share, expected, rel_tol=1e-9), f"expected {expected:.4f}, got {share:.4f}"
    assert useful_share(1000, 64, 0.0) < 1e-2 / comb(4, 2), "no right answer, no information"
    print("right: information needed over bits carried")
