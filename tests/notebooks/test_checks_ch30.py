"""The checks of chapter 30 accept right answers and explain plausible wrong ones."""

import pytest
from checks.ch30 import check_crossing, check_visible_pairs


def visible_pairs(l, w):
    w = min(w, l)
    return w * (w + 1) // 2 + (l - w) * w


def crossing(base, slope, flat):
    return max(0.0, (flat - base) / slope)


def test_right_answers_pass(capsys):
    check_visible_pairs(visible_pairs)
    check_crossing(crossing)
    assert capsys.readouterr().out.count("OK") == 2


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_visible_pairs, lambda l, w: l * w, "no w inputs behind"),
        (check_visible_pairs, lambda l, w: sum(min(t, w) for t in range(l)), "its own input"),
        (check_visible_pairs, lambda l, w: w * (w + 1) // 2 + (l - w) * w, "longer than the"),
        (check_visible_pairs, lambda l, w: visible_pairs(l, w) + 1, "pairs, not"),
        (check_crossing, lambda base, slope, flat: flat / slope, "costs its base"),
        (check_crossing, lambda base, slope, flat: (base - flat) / slope, "sign is wrong"),
        (check_crossing, lambda base, slope, flat: 1.0, "equal at"),
        (check_crossing, lambda base, slope, flat: (flat - base) / slope, "crosses at 0"),
    ],
)
def test_wrong_answers_are_explained(check, wrong, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong)
