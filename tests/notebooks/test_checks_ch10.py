"""The checks of chapter 10 accept right answers and say what is wrong with plausible wrong ones."""

from math import lgamma, log

import pytest
from checks.ch10 import check_bits_per_byte, check_pairs_to_carry


def bits_needed(n: int, accuracy: float) -> float:
    return 12.0 * n if accuracy == 1.0 else 0.0


def log2_choices(M: int, n: int) -> float:
    return (lgamma(M + 1) - lgamma(M - n + 1)) / log(2)


def test_right_answers_pass(capsys):
    check_pairs_to_carry(lambda n, seen, M=4096: log2_choices(M - seen, n - seen))
    check_bits_per_byte(lambda size, n, a: bits_needed(n, a) / (8 * size), bits_needed)
    assert capsys.readouterr().out.count("right") == 2


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda n, seen, M=4096: log2_choices(M, n), "need carry nothing"),
        (lambda n, seen, M=4096: log2_choices(M, n - seen), "cannot be drawn again"),
        (lambda n, seen, M=4096: (n - seen) * log(M) / log(2), "5 of 9 values in order"),
    ],
)
def test_wrong_bits_are_explained(answer, says):
    with pytest.raises(AssertionError, match=says):
        check_pairs_to_carry(answer)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda size, n, a: bits_needed(n, a) / size, "1000 bytes are 8000 bits"),
        (lambda size, n, a: 8 * size / bits_needed(n, 1.0), "at most 1"),
    ],
)
def test_wrong_shares_are_explained(answer, says):
    with pytest.raises(AssertionError, match=says):
        check_bits_per_byte(answer, bits_needed)
