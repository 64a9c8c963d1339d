"""Noisy in-context recall: pairs of a key and a value, some slots noise instead.

    a X | ~ ~ | b Y | a X | ~ ~ | c X | .. | b
                      ^X                     ^Y      labels, at keys that came before

Few keys and many slots, so keys come again and again with the value they first had.  What must be
kept is the map from keys to values; what must be passed over, noise (MAD, Poli and others 2024).
It is `fuzzy_recall` with words of one token: its ids and its conventions hold here too.

Symbols: N examples, L sequence length, V vocabulary.
"""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from bmojo_core.tasks.fuzzy_recall import fuzzy_recall


def noisy_recall(
    num_examples: int,
    seq_len: int,
    vocab_size: int = 32,
    noise_vocab_size: int = 16,
    noise: float = 0.2,
    multi_query: bool = True,
    seed: int = 0,
) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N L"]]:
    """Examples of recall among noise.

    Parameters
    ----------
    num_examples, seq_len
        N and L; at least 3, or 4 for a single query.
    vocab_size, noise_vocab_size
        V, and how many of its tokens are noise.
    noise
        Probability that a slot (two tokens) is noise, in [0, 1).
    multi_query
        Whether every key that came before is a query, or only the last one, behind a prefix token.
    seed
        Equal seeds give equal examples.

    Returns
    -------
    input_ids, labels
        Both (N, L) int64; ``labels`` holds the value at the position of each key that is asked,
        the last position among them, and -100 elsewhere.

    Raises
    ------
    ValueError
        When a size is impossible.
    """
    return fuzzy_recall(
        num_examples, seq_len, vocab_size, key_size=1, value_size=1,
        noise_vocab_size=noise_vocab_size, noise=noise, multi_query=multi_query, seed=seed,
    )  # fmt: skip
