"""Fuzzy in-context recall: keys and values are words of several tokens, unmarked.

    0 0 | a b  X Y Z | c  W | ~ ~ ~ | d e f  U V | c  W | .. | a b  X Y
                                                   ^W          ^X ^Y ^Z     labels, multi_query

A row is a run of slots, each a key with its value or, with a probability, noise (~) of the same
length.  A key that comes again has its first value again; there the value must be said, token by
token, each at the position before it.  The last slot always asks a key seen before, and the row
ends where the last token of that answer is due.  With one query only, a prefix token announces it.

Sizes of keys and values are uniform, words of one size are uniform over arrangements of different
tokens (MAD, Poli and others 2024, section 3.1; there the noisy and the fuzzy task).

Symbols: N examples, L sequence length, V vocabulary, S slots, a, c longest key and value.

    id 0             padding, in front of the first slot
    [1, 1 + K)       tokens of keys, K = (V - 2 - noise tokens) // 2
    [1 + K, M)       tokens of values
    [M, V - 1)       noise
    V - 1            prefix of a single query
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.random import Generator
from torch import Tensor

from bmojo_core.batches import IGNORED
from bmojo_core.tasks._draws import check_integers, first_occurrence
from bmojo_core.tasks.mqar import _distinct

CELLS = 2_000_000  # of one block of rows: bounds the memory to some tens of megabytes


@dataclass(frozen=True)
class _Words:
    """Words (N, S, size) padded by zeros, and how many tokens each has (N, S)."""

    tokens: np.ndarray
    size: np.ndarray

    def take(self, slot: np.ndarray) -> _Words:
        """The words of other slots (N, S') of the same row."""
        tokens = np.take_along_axis(self.tokens, slot[..., None], axis=1)
        return _Words(tokens, np.take_along_axis(self.size, slot, axis=1))


@dataclass(frozen=True)
class _Task:
    """Sizes and the division of the vocabulary."""

    seq_len: int
    vocab_size: int
    key_size: int
    min_key_size: int
    value_size: int
    noise_vocab_size: int
    noise: float
    multi_query: bool

    @property
    def keys(self) -> tuple[int, int]:
        """First token of keys, and how many there are."""
        return 1, (self.vocab_size - 2 - self.noise_vocab_size) // 2

    @property
    def values(self) -> tuple[int, int]:
        """First token of values, and how many there are."""
        first = 1 + self.keys[1]
        return first, self.vocab_size - 1 - self.noise_vocab_size - first


def fuzzy_recall(
    num_examples: int,
    seq_len: int,
    vocab_size: int = 16,
    key_size: int = 3,
    value_size: int = 3,
    min_key_size: int = 1,
    noise_vocab_size: int = 0,
    noise: float = 0.0,
    multi_query: bool = True,
    seed: int = 0,
) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N L"]]:
    """Examples of recall where keys and values have several tokens.

    Parameters
    ----------
    num_examples, seq_len
        N and L; a pair and its query must fit however long they come out.
    vocab_size, noise_vocab_size
        V, and how many of its tokens are noise; all ids are named in the module's heading.
    key_size, value_size
        Tokens of the longest key and value.
    min_key_size
        Tokens of the shortest key: equal to ``key_size`` in MAD's evaluation, 1 in its training.
    noise
        Probability that a slot is noise, in [0, 1).
    multi_query
        Whether every repeated key is a query, or only the last slot, announced by the prefix.
    seed
        Equal seeds give equal examples.

    Returns
    -------
    input_ids, labels
        Both (N, L) int64; ``labels`` holds the next token of the value where one must be said, and
        -100 elsewhere.

    Raises
    ------
    ValueError
        When a size is impossible.
    """
    check_integers(
        num_examples=num_examples, seq_len=seq_len, vocab_size=vocab_size, key_size=key_size,
        value_size=value_size, min_key_size=min_key_size,
    )  # fmt: skip
    check_integers(0, noise_vocab_size=noise_vocab_size)
    task = _Task(
        seq_len, vocab_size, key_size, min_key_size, value_size, noise_vocab_size, noise,
        bool(multi_query),
    )  # fmt: skip
    _check(task)
    rng = np.random.default_rng(seed)
    block = max(1, CELLS // (seq_len * (key_size + value_size)))
    counts = [min(block, num_examples - start) for start in range(0, num_examples, block)]
    parts = [_rows(rng, n, task) for n in counts]
    ids, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return torch.from_numpy(ids), torch.from_numpy(labels)


def _rows(rng: Generator, n: int, task: _Task) -> tuple[np.ndarray, np.ndarray]:
    """n rows: draw pairs, keep as many as fit, put the one to be asked at a random place."""
    prefix = 0 if task.multi_query else 1
    slots = 1 + (task.seq_len - prefix) // (task.min_key_size + 1)
    keys = _words(rng, n, slots, task.min_key_size, task.key_size, *task.keys)
    values = _words(rng, n, slots, 1, task.value_size, *task.values)
    noisy = rng.random((n, slots)) < task.noise
    noisy[:, 0] = False  # the pair to be asked comes first, for now
    codes = _codes(keys, task.keys[1], noisy)
    values = values.take(first_occurrence(codes))  # a key keeps its first value

    length = keys.size + values.size
    query = length[:, :1] - 1 + prefix  # the row ends before the last token of the answer
    kept = np.cumsum(length, axis=1) <= task.seq_len - query
    order = _with_query(_asked_pair_anywhere(rng, kept))
    keys, values = keys.take(order), values.take(order)
    here, noisy, codes = (np.take_along_axis(x, order, axis=1) for x in (kept, noisy, codes))
    column = np.arange(slots + 1)
    again = first_occurrence(codes) < column
    scored = again & here & ~noisy if task.multi_query else again & (column == slots)
    return _write(rng, task, keys, values, here, noisy, scored)


def _asked_pair_anywhere(rng: Generator, kept: np.ndarray) -> np.ndarray:
    """The order (N, S) that moves slot 0 to a uniform place among the kept ones, the first few."""
    place = np.broadcast_to(np.arange(kept.shape[1], dtype=float), kept.shape).copy()
    place[:, 0] = rng.integers(0, kept.sum(1)) + 0.5
    return np.argsort(place, axis=1)


def _with_query(order: np.ndarray) -> np.ndarray:
    """Slot 0 once more, at the end."""
    return np.concatenate([order, np.zeros_like(order[:, :1])], axis=1)


def _write(
    rng: Generator, task: _Task, keys: _Words, values: _Words, here: np.ndarray,
    noisy: np.ndarray, scored: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Lay the slots out so that the last answer is due at the last position."""
    n, length = len(here), np.where(here, keys.size + values.size, 0)
    prefix = 0 if task.multi_query else 1
    length[:, -1] += prefix
    end = np.cumsum(length, axis=1)
    start = end - length + (task.seq_len + 1 - end[:, -1:])  # one column more, cut off at the end
    start[:, -1] += prefix
    wide = np.zeros((2, n, task.seq_len + 1), np.int64)
    ids, labels = wide
    labels[:] = IGNORED
    row = np.broadcast_to(np.arange(n)[:, None], here.shape)
    if prefix:
        ids[np.arange(n), start[:, -1] - 1] = task.vocab_size - 1
    for words, offset in ((keys, 0), (values, keys.size)):
        for j in range(words.tokens.shape[2]):
            used = here & (j < words.size)
            at = (row[used], (start + offset + j)[used])
            token = words.tokens[..., j][used]
            if task.noise:
                first = sum(task.values)
                noise = rng.integers(first, first + task.noise_vocab_size, token.shape)
                token = np.where(noisy[used], noise, token)
            ids[at] = token
            if words is values:
                asked = scored[used]
                labels[at[0][asked], at[1][asked] - 1] = token[asked]
    return ids[:, :-1].copy(), labels[:, :-1].copy()


def _words(
    rng: Generator, n: int, slots: int, shortest: int, longest: int, first: int, pool: int
) -> _Words:
    """Uniform sizes, then uniform arrangements of that many different tokens."""
    size = rng.integers(shortest, longest + 1, (n, slots))
    tokens = first + _distinct(rng, n * slots, longest, pool).reshape(n, slots, longest)
    return _Words(tokens * (np.arange(longest) < size[..., None]), size)


def _codes(keys: _Words, pool: int, noisy: np.ndarray) -> np.ndarray:
    """One number a key, different keys different numbers; every noise slot one of its own."""
    base = pool + 1
    code = keys.tokens @ base ** np.arange(keys.tokens.shape[2])
    return np.where(noisy, -1 - np.arange(noisy.shape[1]), code)


def _check(task: _Task) -> None:
    if not (np.isfinite(task.noise) and 0 <= task.noise < 1):
        raise ValueError(f"noise must be in [0, 1), got {task.noise}")
    if task.noise and not task.noise_vocab_size:
        raise ValueError("noise_vocab_size must be at least 1 when noise > 0, got 0")
    if task.min_key_size > task.key_size:
        raise ValueError(
            f"min_key_size must be at most key_size = {task.key_size}, got {task.min_key_size}"
        )
    needed = 2 + task.noise_vocab_size + 2 * max(task.key_size, task.value_size)
    if task.vocab_size < needed:
        raise ValueError(
            f"vocab_size must be at least {needed}, for words of {task.key_size} and "
            f"{task.value_size} different tokens and {task.noise_vocab_size} of noise, "
            f"got {task.vocab_size}"
        )
    if task.key_size * np.log2(task.keys[1] + 1) > 62:
        raise ValueError(
            f"key_size must be small enough that all keys can be numbered in 63 bits, got "
            f"{task.key_size} with {task.keys[1]} tokens"
        )
    longest = 2 * (task.key_size + task.value_size) - (1 if task.multi_query else 0)
    if task.seq_len < longest:
        raise ValueError(f"seq_len must be at least {longest}, got {task.seq_len}")
