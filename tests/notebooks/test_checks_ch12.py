"""The checks of chapter 12 accept right answers and explain plausible wrong ones."""

import numpy as np
import pytest
from checks.ch12 import check_remember, check_window_ceiling


def ceiling(steps, reach, values, near=lambda d, r: d < r, rest=lambda p, m: (1 - p) / m):
    p = np.mean([near(d, reach) for d in steps])
    return p + rest(p, values)


def remember(row, keys, values, store=lambda m, k, v: m.setdefault(k, v), noise=False):
    memory, said = {}, {}
    for t, token in enumerate(row):
        if token in memory and (token in keys or noise):
            said[t] = memory[token]
        if t > 0 and (noise or (token in values and row[t - 1] in keys)):
            store(memory, row[t - 1], token)
    return said, len(memory)


def every_pair(row, keys, values):
    said, places = remember(row, keys, values)
    return said, places if len(row) < 12 else len(row) // 2


def says_at_once(row, keys, values):
    known = {k: v for k, v in zip(row[::2], row[1::2], strict=False) if k in keys}
    return {t: known[k] for t, k in enumerate(row) if k in known}, len(known)


def any_token_after_a_key(row, keys, values):
    memory, said = {}, {}
    for t, token in enumerate(row):
        if token in memory:
            said[t] = memory[token]
        if t > 0 and row[t - 1] in keys and token not in keys:
            memory.setdefault(row[t - 1], token)
    return said, len(memory)


def the_last_key(row, keys, values):
    memory, said, last = {}, {}, None
    for t, token in enumerate(row):
        if token in keys:
            last = token
            if token in memory:
                said[t] = memory[token]
        elif token in values and last is not None:
            memory.setdefault(last, token)
    return said, len(memory)


def test_right_answers_pass(capsys):
    check_window_ceiling(ceiling)
    check_remember(remember)
    assert capsys.readouterr().out.count("OK") == 2


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_window_ceiling, lambda s, r, v: ceiling(s, r, v, rest=lambda p, m: 0.0), "a guess"),
        (check_window_ceiling, lambda s, r, v: ceiling(s, r, v, near=lambda d, r: d <= r), "5 ste"),
        (check_window_ceiling, lambda s, r, v: min(1, ceiling(s, r, v, rest=lambda p, m: 1 / m)),
         "beyond reach only"),
        (check_window_ceiling, lambda s, r, v: 0.5, "all answers in reach"),
        (check_remember, says_at_once, "no value yet"),
        (check_remember, lambda r, k, v: ({}, 0), "comes again at position 2"),
        (check_remember, lambda r, k, v: remember(r, k, v, noise=True), "not"),
        (check_remember, lambda r, k, v: remember(r, k, v, store=dict.__setitem__), "the latest"),
        (check_remember, any_token_after_a_key, "9 is noise, and 5 follows noise"),
        (check_remember, the_last_key, "9 is noise, and 5 follows noise"),
        (check_remember, every_pair, "one different key"),
    ],
)  # fmt: skip
def test_wrong_answers_are_explained(check, wrong, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong)
