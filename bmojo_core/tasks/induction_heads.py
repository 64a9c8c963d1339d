"""Induction heads: a special token stood once before some token; it comes again - what followed?

    a c b * d a c .. b a *
                         ^d        label, at the last position

One pair, one query, any distance: what is asked of a memory is not room but to know what matters,
at lengths never seen in training (Olsson and others; Mamba, section 4.1.2).

Symbols: N examples, L sequence length, V vocabulary; V - 1 is the special token *, all others are
drawn uniformly from [0, V - 1).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from bmojo_core.batches import IGNORED
from bmojo_core.tasks._draws import check_integers


def induction_heads(
    num_examples: int,
    seq_len: int,
    vocab_size: int = 16,
    seed: int = 0,
) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N L"]]:
    """Examples of the induction-heads task.

    Parameters
    ----------
    num_examples, seq_len
        N and L >= 3; the special token stands at a uniform place in [0, L - 2) and at L - 1.
    vocab_size
        V, at least 3.
    seed
        Equal seeds give equal examples.

    Returns
    -------
    input_ids, labels
        Both (N, L) int64.  ``labels`` holds at the last position the token that followed the first
        special one, -100 elsewhere.

    Raises
    ------
    ValueError
        When a size is impossible.
    """
    check_integers(num_examples=num_examples)
    check_integers(3, seq_len=seq_len, vocab_size=vocab_size)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size - 1, (num_examples, seq_len))
    row = np.arange(num_examples)
    at = rng.integers(0, seq_len - 2, num_examples)
    ids[row, at] = ids[:, -1] = vocab_size - 1
    labels = np.full_like(ids, IGNORED)
    labels[:, -1] = ids[row, at + 1]
    return torch.from_numpy(ids), torch.from_numpy(labels)
