"""The checks of chapter 7 accept right answers and explain plausible wrong ones."""

import pytest
from checks.ch07 import check_offsets, check_order_one_window_form


def row(a, b, c, d, t):
    phi = c[t] * a[t - 1] / c[t - 1]
    return c[t] * b[t - 1] - phi * d[t - 1], phi


def test_right_answers_pass(capsys):
    check_offsets([-2, -1, 0, 1])
    check_order_one_window_form(row)
    assert capsys.readouterr().out.count("OK") == 2


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (check_offsets, [0], "frozen"),
        (check_offsets, range(-3, 3), "whole row"),
        (check_offsets, range(-3, 1), "alpha_2"),
        (check_offsets, [-1, 0], "n \\+ 1 = 4"),
        (check_offsets, range(-1, 3), "shift the window"),
        (check_offsets, [-2.9, -1.2, 0, 1], "whole number"),
        (check_order_one_window_form, lambda a, b, c, d, t: (b[t], a[t]), "frozen pole"),
        (
            check_order_one_window_form,
            lambda a, b, c, d, t: (c[t] * b[t - 1], row(a, b, c, d, t)[1]),
            "misses a term",
        ),
        (check_order_one_window_form, lambda a, b, c, d, t: (0.0, a[t - 1]), "phi must carry"),
        (
            check_order_one_window_form,
            lambda a, b, c, d, t: (0.0, row(a, b, c, d, t)[1]),
            "theta must be",
        ),
    ],
)
def test_wrong_answers_are_explained(check, answer, message):
    with pytest.raises(AssertionError, match=message):
        check(answer)
