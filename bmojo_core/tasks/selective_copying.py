"""Selective copying: n tokens lie scattered among blanks; say them again in order.

    0 a 0 0 b c 0 0 d 0 0 | m m m m
                            ^a ^b ^c ^d        labels, at the markers

A linear time-invariant system can only copy from fixed delays; here the delays differ from row to
row, so the dynamics must depend on the input (Mamba, section 4.1.1; Arjovsky and others for the
task with fixed delays).

Symbols: N examples, L sequence length, n tokens to copy, V vocabulary; 0 is the blank, V - 1 the
marker m, and tokens are drawn from [1, V - 1).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from bmojo_core.batches import IGNORED
from bmojo_core.tasks._draws import check_integers


def selective_copying(
    num_examples: int,
    seq_len: int,
    num_tokens: int = 16,
    vocab_size: int = 16,
    seed: int = 0,
) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N L"]]:
    """Examples of selective copying.

    Parameters
    ----------
    num_examples, seq_len, num_tokens
        N, L and n; the last n of the L positions are markers, so 2 n <= L.  (Mamba's L = 4096
        counts the blanks only: that is seq_len = 4096 + 2 n here.)
    vocab_size
        V, at least 3.
    seed
        Equal seeds give equal examples.

    Returns
    -------
    input_ids, labels
        Both (N, L) int64.  ``labels`` holds the j-th token at the j-th marker, -100 elsewhere.

    Raises
    ------
    ValueError
        When a size is impossible.
    """
    check_integers(num_examples=num_examples, seq_len=seq_len, num_tokens=num_tokens)
    check_integers(3, vocab_size=vocab_size)
    if seq_len < 2 * num_tokens:
        raise ValueError(
            f"seq_len must be at least 2 * num_tokens = {2 * num_tokens}, got {seq_len}"
        )
    rng = np.random.default_rng(seed)
    places = seq_len - num_tokens
    tokens = rng.integers(1, vocab_size - 1, (num_examples, num_tokens))
    ids = np.zeros((num_examples, seq_len), np.int64)
    np.put_along_axis(ids, _subsets(rng, num_examples, num_tokens, places), tokens, axis=1)
    ids[:, places:] = vocab_size - 1
    labels = np.full_like(ids, IGNORED)
    labels[:, places:] = tokens
    return torch.from_numpy(ids), torch.from_numpy(labels)


def _subsets(rng: np.random.Generator, rows: int, count: int, pool: int) -> np.ndarray:
    """In each row a uniform set of ``count`` places out of ``pool``, in ascending order."""
    noise = rng.random((rows, pool), dtype=np.float32)
    return np.sort(np.argpartition(noise, count - 1, axis=1)[:, :count], axis=1)
