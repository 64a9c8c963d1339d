"""Multi-query associative recall: k keys with values, then some keys again; what was the value?

    k_1 v_1 k_2 v_2 .. k_n v_n | . . k_3 . . . k_1 . k_n . . .
                                     ^v_3      ^v_1  ^v_n        labels, at the query's position

Keys are drawn without replacement from [1, V/2), values from [V/2, V).  Queries stand in the even
slots behind the pairs; slot i is used with a probability proportional to i^(a - 1) (a = ``power``),
so most queries come soon and some come late: only those beyond the window test a memory.

Symbols: N examples, L sequence length, n pairs, V vocabulary, S slots.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from numpy.random import Generator
from torch import Tensor

from bmojo_core.batches import IGNORED
from bmojo_core.tasks._draws import check_integers


def mqar(
    num_examples: int,
    seq_len: int,
    num_pairs: int,
    vocab_size: int = 8192,
    power: float = 0.01,
    filler: str = "zeros",
    seed: int = 0,
) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N L"]]:
    """Examples of multi-query associative recall (Zoology's generator, vectorised).

    Parameters
    ----------
    num_examples, seq_len, num_pairs
        N, L and n; 4 n <= L, so that every key can be asked once.
    vocab_size
        V; keys and values need n different tokens each.
    power
        a of the law i^(a - 1) for the slots of the queries; small values ask early.
    filler
        What stands in slots that are not used: ``"zeros"``, or ``"random"`` tokens.
    seed
        Equal seeds give equal examples.

    Returns
    -------
    input_ids, labels
        Both (N, L) int64.  ``labels`` holds the value at the position of each query and -100
        elsewhere: the model must answer where it is asked, there is no shift.

    Raises
    ------
    ValueError
        When a size is impossible or ``filler`` is unknown.
    """
    _check(num_examples, seq_len, num_pairs, vocab_size, power, filler)
    rng = np.random.default_rng(seed)
    half = vocab_size // 2
    keys = 1 + _distinct(rng, num_examples, num_pairs, half - 1)
    values = half + _distinct(rng, num_examples, num_pairs, vocab_size - half)
    slots = _query_slots(rng, num_examples, num_pairs, (seq_len - 2 * num_pairs) // 2, power)
    at = 2 * num_pairs + 2 * slots  # (N, n) position of each query

    shape = (num_examples, seq_len)
    ids = np.zeros(shape, np.int64)
    if filler == "random":
        ids[:] = rng.integers(0, vocab_size, shape)
    ids[:, 0 : 2 * num_pairs : 2] = keys
    ids[:, 1 : 2 * num_pairs : 2] = values
    np.put_along_axis(ids, at, keys, axis=1)
    labels = np.full(shape, IGNORED, np.int64)
    np.put_along_axis(labels, at, values, axis=1)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def _distinct(rng: Generator, rows: int, count: int, pool: int) -> np.ndarray:
    """``count`` different numbers from 0..pool-1 in each row, uniform over ordered choices.

    Rows with a repetition are drawn again: that leaves the distribution of the others untouched.
    Where repetitions are likely, rows are the first entries of permutations instead.
    """
    if count * count > 2 * pool:
        return _permuted(rng, rows, count, pool)
    drawn = rng.integers(0, pool, (rows, count))
    repeated = np.arange(rows)
    while repeated.size:
        ordered = np.sort(drawn[repeated], axis=1)
        repeated = repeated[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
        drawn[repeated] = rng.integers(0, pool, (repeated.size, count))
    return drawn


def _permuted(rng: Generator, rows: int, count: int, pool: int) -> np.ndarray:
    block = max(1, 4_000_000 // pool)  # bounds the memory of the random keys to 32 MB
    parts = []
    for start in range(0, rows, block):
        noise = rng.random((min(block, rows - start), pool))
        chosen = np.argpartition(noise, count - 1, axis=1)[:, :count]
        order = np.take_along_axis(noise, chosen, axis=1).argsort(axis=1)
        parts.append(np.take_along_axis(chosen, order, axis=1))
    return np.concatenate(parts) if parts else np.empty((0, count), np.int64)


def _query_slots(rng: Generator, rows: int, count: int, slots: int, power: float) -> np.ndarray:
    """Slots drawn one after another without replacement, P(i) proportional to i^(power - 1).

    The order of log P(i) + Gumbel noise is that of such draws (Yellott 1977).
    """
    log_p = (power - 1) * np.log(np.arange(1, slots + 1))
    score = log_p - np.log(rng.standard_exponential((rows, slots)))
    return np.argsort(-score, axis=1)[:, :count]


def _check(num_examples, seq_len, num_pairs, vocab_size, power, filler) -> None:
    check_integers(num_examples=num_examples, seq_len=seq_len, num_pairs=num_pairs)
    if 4 * num_pairs > seq_len:
        raise ValueError(f"seq_len must be at least 4 * num_pairs = {4 * num_pairs}, got {seq_len}")
    if vocab_size < 2 * num_pairs + 2:
        raise ValueError(
            f"vocab_size must be at least {2 * num_pairs + 2}, for {num_pairs} different keys and "
            f"values, got {vocab_size}"
        )
    if not (np.isfinite(power) and power > 0):
        raise ValueError(f"power must be positive and finite, got {power}")
    if filler not in ("zeros", "random"):
        raise ValueError(f"filler must be 'zeros' or 'random', got {filler!r}")
