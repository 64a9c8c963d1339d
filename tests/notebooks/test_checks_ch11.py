"""The checks of chapter 11 accept right answers and explain plausible wrong ones."""

import pytest
from checks.ch11 import check_both_kept, check_keep


def keep(scores, size, evict=lambda m: (m[0], -m[1]), larger=lambda e, least: e > least):
    memory = []
    for t, e in enumerate(scores):
        if len(memory) == size:
            last = min(memory, key=evict)
            if not larger(e, last[0]):
                continue
            memory.remove(last)
        memory.append((e, t))
    return sorted(t for _, t in memory)


def best_first(scores, size):
    return sorted(range(len(scores)), key=lambda t: -scores[t])[:size]


def test_right_answers_pass(capsys):
    check_keep(keep)
    check_keep(lambda scores, size: sorted(best_first(scores, size)))
    check_both_kept(lambda m, s: m * (m - 1) / (s * (s - 1)))
    assert capsys.readouterr().out.count("OK") == 3


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_keep, lambda scores, size: list(range(len(scores)))[-size:], "evict the oldest"),
        (check_keep, lambda scores, size: list(range(len(scores)))[:size], "must be stored"),
        (check_keep, lambda s, k: keep(s, k, larger=lambda e, m: e >= m), "not larger"),
        (check_keep, lambda s, k: keep(s, k, evict=lambda m: m), "the youngest goes"),
        (check_keep, lambda s, k: best_first(s, k)[::-1], "oldest first"),
        (check_keep, lambda s, k: [t for t in keep(s, k) if s[t] > 1], "while there is room"),
        (check_both_kept, lambda m, s: m / s, "one place cannot hold two"),
        (check_both_kept, lambda m, s: 0.0 if m == 1 else (m / s) ** 2, "independently"),
        (check_both_kept, lambda m, s: 0.0 if m == 1 else 1 - (1 - m / s) ** 2, "at least one"),
        (check_both_kept, lambda m, s: (m - 1) / (s - 1), "a share 0.1667 holds both"),
    ],
)
def test_wrong_answers_are_explained(check, wrong, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong)
