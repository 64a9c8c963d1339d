"""Text to train on: one long row of token ids in a file, cut into sequences by step.

    step s, row i:   ids[a : a + l + 1],  a uniform in 0 .. n - l - 1 from the seed (seed, s, i)

The input is the first l of them and the label of each is its successor.  A file of ids is read
through a memory map, so a corpus may be larger than memory, and step s gives the same examples
whenever it is asked: a run that was interrupted goes on exactly.

Symbols: n tokens in the file, b rows a batch, l tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def read_tokens(path: str | Path) -> np.ndarray:
    """Token ids of a file (n,): a ``.npy`` of integers, or any other file as its bytes.

    Raises
    ------
    ValueError
        When a ``.npy`` is not one row of integers, or there is nothing in the file.
    OSError
        When the file cannot be read.
    """
    path = Path(path)
    if path.suffix == ".npy":
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{path} must hold one row of integers, got shape {ids.shape} of {ids.dtype}"
            )
    elif path.stat().st_size:
        ids = np.memmap(path, dtype=np.uint8, mode="r")
    else:
        ids = np.empty(0, np.uint8)
    if len(ids) < 2:
        raise ValueError(f"{path} must hold at least two tokens, got {len(ids)}")
    return ids


def sequences(
    ids: np.ndarray, batch_size: int, length: int, seed: int
) -> Callable[[int], tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]]:
    """``batch(step)``: (input_ids, labels) of random places in a row of tokens.

    Raises
    ------
    ValueError
        When the row is too short for one sequence and its label, or a size is not positive.
    """
    if batch_size < 1 or length < 1:
        raise ValueError(f"batch_size and length must be at least 1, got {batch_size}, {length}")
    if len(ids) < length + 1:
        raise ValueError(f"length must be below the {len(ids)} tokens there are, got {length}")

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((seed, step))
        begins = rng.integers(0, len(ids) - length, batch_size)
        rows = np.stack([np.asarray(ids[a : a + length + 1], np.int64) for a in begins])
        rows = torch.from_numpy(rows)
        return rows[:, :-1], rows[:, 1:]

    return batch
