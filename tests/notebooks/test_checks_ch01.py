"""The checks of chapter 1 accept right answers and explain plausible wrong ones."""

import numpy as np
import pytest
from checks.ch01 import check_memory_needed, check_realize

from realization import block_hankel


def memory_needed(markov):
    r = len(markov) // 2
    s = np.linalg.svd(block_hankel(markov, r, r), compute_uv=False)
    return int((s > 1e-10 * max(s[0], 1e-300)).sum())


def realize(markov, n):
    k, p, m = markov.shape
    U, s, Vt = np.linalg.svd(block_hankel(markov, k // 2, k // 2))
    O, R = U[:, :n] * np.sqrt(s[:n]), np.sqrt(s[:n])[:, None] * Vt[:n]
    return np.linalg.lstsq(O[:-p], O[p:], rcond=None)[0], R[:, :m], O[:p], markov[0]


def test_right_answers_pass(capsys):
    check_memory_needed(memory_needed)
    check_realize(realize)
    assert capsys.readouterr().out.count("OK") == 2


def counts_nonzero(markov):
    return 1 if markov[1:].any() else 0


def no_tolerance(markov):
    r = len(markov) // 2
    s = np.linalg.svd(block_hankel(markov, r, r), compute_uv=False)
    return int((s > 0).sum())


def with_feedthrough(markov):
    return memory_needed(np.concatenate([np.zeros_like(markov[:1]), markov]))


def first_channel(markov):
    return memory_needed(markov[:, :1, :1]) if markov.shape[1] == 1 else 4


def sums_channels(markov):
    return memory_needed(markov.sum(axis=(1, 2), keepdims=True))


def absolute_tolerance(tolerance):
    def wrong(markov):
        r = len(markov) // 2
        s = np.linalg.svd(block_hankel(markov, r, r), compute_uv=False)
        return int((s > tolerance).sum())

    return wrong


@pytest.mark.parametrize(
    "wrong, word",
    [
        (counts_nonzero, "on their way"),
        (no_tolerance, "rounding errors"),
        (with_feedthrough, "leave it out"),
        (first_channel, "p x m blocks"),
        (sums_channels, "Do not add the channels up"),
        (absolute_tolerance(1e-10), "not with a fixed number"),
        (absolute_tolerance(1e-6), "not with a fixed number"),
    ],
)
def test_wrong_counts_are_explained(wrong, word):
    with pytest.raises(AssertionError, match=word):
        check_memory_needed(wrong)


def wrong_shift(markov, n):
    _A, B, C, D = realize(markov, n)
    k, _p, _m = markov.shape
    U, s, _ = np.linalg.svd(block_hankel(markov, k // 2, k // 2))
    O = U[:, :n] * np.sqrt(s[:n])
    return np.linalg.lstsq(O[:-1], O[1:], rcond=None)[0], B, C, D


def unscaled(markov, n):
    A, B, C, D = realize(markov, n)
    return A, 2 * B, C, D


def forgets_D(markov, n):
    A, B, C, D = realize(markov, n)
    return A, B, C, 0 * D


def transposed(markov, n):
    A, B, C, D = realize(markov, n)
    return A, B.T, C, D


@pytest.mark.parametrize(
    "wrong, word",
    [
        (wrong_shift, "not by one row"),
        (unscaled, "C B must be M_1"),
        (forgets_D, r"D must be markov\[0\]"),
        (transposed, "must have shape"),
    ],
)
def test_wrong_realizations_are_explained(wrong, word):
    with pytest.raises(AssertionError, match=word):
        check_realize(wrong)
