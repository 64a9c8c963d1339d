"""Checks of the tour's exercises: each explains what is wrong with an answer."""

from collections.abc import Callable

import torch

from bmojo_core.layers.selection import Observed


def check_tokens_needed(tokens_needed: Callable[[int], tuple[int, int]]) -> None:
    """Exercise 1: the memory that n pairs need."""
    for pairs in (1, 8, 64):
        answer = tokens_needed(pairs)
        assert isinstance(answer, tuple) and len(answer) == 2, (
            f"return two numbers, (separate, joined); for {pairs} pairs you returned {answer!r}"
        )
        separate, joined = answer
        assert separate != pairs, (
            "a value stored without its key cannot be found again: both tokens of a pair count"
        )
        assert separate == 2 * pairs, f"{pairs} pairs are {2 * pairs} tokens, not {separate}"
        assert joined != 2 * pairs, "a value that carries its key needs no second token for the key"
        assert joined == pairs, f"one token a pair: {pairs}, not {joined}"
    print("right: 2 n tokens, or n when the value carries its key")


def check_policy(policy: Callable[[Observed], torch.Tensor]) -> None:
    """Exercise 2: a policy scores every token, looks at no later one, and grows with the output."""
    generator = torch.Generator().manual_seed(0)
    seen = _observed(torch.randn(2, 12, 6, generator=generator))
    score = policy(seen)
    assert score.shape == (2, 12), f"one score a token: shape (2, 12), not {tuple(score.shape)}"
    later = seen.y.clone()
    later[:, 7:] += 3.0
    changed = policy(_observed(later))
    assert torch.allclose(score[:, :7], changed[:, :7]), (
        "the score of an early token changed when only later tokens did: a memory cannot wait"
    )
    larger = policy(_observed(3.0 * seen.y))
    assert (larger > score).all(), "a larger output must get a larger score; yours does not"
    print("right: one score a token, from the past alone, larger for larger outputs")


def _observed(y: torch.Tensor) -> Observed:
    b, l, d = y.shape
    return Observed(
        y=y,
        past_y=torch.zeros(b, 4, d),
        keys=torch.ones(b, l, 1, 2),
        past_key_sum=torch.zeros(b, 1, 2),
        position=torch.arange(l).expand(b, -1),
        oracle=None,
        taps=4,
        seed=0,
    )
