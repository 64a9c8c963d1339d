"""The checks of chapter 6 accept right answers and explain plausible wrong ones."""

import numpy as np
import pytest
from checks.ch06 import check_step_for_span, check_tustin


def test_right_answers_pass(capsys):
    check_step_for_span(np.log(100) / 512)
    check_step_for_span(0.009)
    check_tustin(lambda z: (1 + z / 2) / (1 - z / 2))
    assert capsys.readouterr().out.count("OK") == 3


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (check_step_for_span, np.log(100), "99 % in one token"),
        (check_step_for_span, 1 / 512, "is left, not 0.01"),
        (check_step_for_span, np.log(100) / 511, "count the steps"),
        (check_step_for_span, np.log(100) / 513, "count the steps"),
        (check_step_for_span, 0.00901, "is left, not 0.01"),
        (check_step_for_span, -0.01, "positive"),
        (check_tustin, lambda z: 1 + z, "Euler"),
        (check_tustin, lambda z: 1 / (1 - z), "Euler"),
        (check_tustin, np.exp, "exp itself"),
        (check_tustin, lambda z: 1 + z + z**2 / 2, "stable for every step"),
        (check_tustin, lambda z: 1 / (1 - z + z**2 / 2), "not the trapezoid"),
        (check_tustin, lambda z: 1 + z / 2, "must fall by 2"),
        (check_tustin, lambda z: 0.5, "entry by entry"),
    ],
)
def test_wrong_answers_are_explained(check, answer, message):
    with pytest.raises(AssertionError, match=message):
        check(answer)
