"""The checks of the tour accept right answers and say what is wrong with plausible wrong ones."""

import pytest
import torch
from checks.ch00 import check_policy, check_tokens_needed


def test_right_answers_pass(capsys):
    check_tokens_needed(lambda n: (2 * n, n))
    check_policy(lambda seen: seen.y.abs().sum(-1))
    assert capsys.readouterr().out.count("right") == 2


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda n: (n, n), "cannot be found again"),
        (lambda n: (2 * n, 2 * n), "needs no second token"),
        (lambda n: 2 * n, "return two numbers"),
        (lambda n: (2 * n + 1, n), "are .* tokens, not"),
    ],
)
def test_wrong_counts_are_explained(answer, says):
    with pytest.raises(AssertionError, match=says):
        check_tokens_needed(answer)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (lambda seen: seen.y.square(), "one score a token"),
        (lambda seen: seen.y.square().mean(-1).flip(1).cumsum(1).flip(1), "cannot wait"),
        (lambda seen: -seen.y.abs().sum(-1), "larger output must get a larger score"),
        (lambda seen: torch.rand(2, 12) * 0 + seen.position, "larger output"),
    ],
)
def test_wrong_policies_are_explained(policy, says):
    with pytest.raises(AssertionError, match=says):
        check_policy(policy)
