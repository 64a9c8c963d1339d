"""The checks of chapter 8 accept right answers and explain plausible wrong ones."""

import pytest
from checks.ch08 import check_crossover, check_half_split


def crossover(e, n, k, g, p):
    return e * (n + k - 1) // (2 * g * p) + 1


def half_split(weight, p):
    return weight.unflatten(0, (-1, p // 2, 2)).transpose(1, 2).flatten(0, 2)


def test_right_answers_pass(capsys):
    check_crossover(crossover)
    check_half_split(half_split)
    out = capsys.readouterr().out
    assert out.count("OK") == 2
    assert "a dozen to a few dozen tokens" in out  # the cases give 39, 15 and 17


def inverse(weight, p):
    return weight.unflatten(0, (-1, 2, p // 2)).transpose(1, 2).flatten(0, 2)


def mixed(weight, p):
    return half_split(weight, len(weight))


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_crossover, lambda e, n, k, g, p: e * n // (2 * g * p) + 1, "tail of k - 1"),
        (check_crossover, lambda e, n, k, g, p: e * (n + k) // (2 * g * p) + 1, "the present"),
        (check_crossover, lambda e, n, k, g, p: e * (n + k - 1) // (g * p) + 1, "key and a value"),
        (check_crossover, lambda e, n, k, g, p: e * (n + k - 1) // (2 * g * p), "holds more from"),
        (check_half_split, inverse, "this is the inverse"),
        (check_half_split, mixed, "different heads got mixed"),
        (check_half_split, lambda weight, p: weight, "should come from"),
        (check_half_split, lambda weight, p: weight[::2], "shape must stay"),
        (check_half_split, lambda weight, p: 0 * weight, "exactly once"),
    ],
)
def test_wrong_answers_are_explained(check, wrong, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong)
