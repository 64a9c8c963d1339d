"""Innovation and eidetic memory, as Algorithm 1 writes them: one token after the other.

    e_t = mean_d (y_t - sum_{j=1..taps} w_j y_{t-j})^2
    insert (t, e_t) into M if e_t > min of M, in the place of that minimum

y (b, l, d) outputs of the SSM; w (taps,) predictor; e (b, l) innovation; M k slots of (t, e).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype


def innovation_reference(
    y: Float[Tensor, "b l d"],
    weights: Float[Tensor, "taps"],
    past: Float[Tensor, "b taps d"] | None,
) -> Float[Tensor, "b l"]:
    """Innovation by a loop over time; see ``bmojo_core.ops.innovation``."""
    dtype = compute_dtype(y)
    y, weights = y.to(dtype), weights.to(dtype)
    b, l, d = y.shape
    taps = weights.shape[0]
    before = y.new_zeros(b, taps, d) if past is None else past.to(dtype)
    outputs = torch.cat([before, y], dim=1)
    errors = []
    for t in range(l):
        prediction = sum(weights[j - 1] * outputs[:, taps + t - j] for j in range(1, taps + 1))
        errors.append((y[:, t] - prediction).square().mean(dim=-1))
    return torch.stack(errors, dim=1)


def running_top_k_reference(
    scores: Float[Tensor, "b l"], k: int, chunk: int
) -> tuple[Int[Tensor, "b c k"], Bool[Tensor, "b c k"]]:
    """The memory at the beginning of every chunk; see ``bmojo_core.ops.innovation``."""
    b, l = scores.shape
    c = math.ceil(l / chunk)
    index = torch.zeros(b, c, k, dtype=torch.int64, device=scores.device)
    valid = torch.zeros(b, c, k, dtype=torch.bool, device=scores.device)
    for row, row_scores in enumerate(scores.tolist()):
        for i, positions in enumerate(memory_before_each_chunk(row_scores, k, chunk)):
            index[row, i, : len(positions)] = torch.tensor(positions, dtype=torch.int64)
            valid[row, i, : len(positions)] = True
    return index, valid


def memory_before_each_chunk(scores: list[float], k: int, chunk: int) -> list[list[int]]:
    """Algorithm 1, step 4, for one sequence: positions remembered when each chunk begins."""
    memory: list[tuple[float, int]] = []  # (e_t, t), oldest first
    snapshots = []
    for t, score in enumerate(scores):
        if t % chunk == 0:
            snapshots.append([position for _, position in memory])
        if k == 0:
            continue
        minimum = -math.inf if len(memory) < k else min(e for e, _ in memory)
        if score > minimum:
            if len(memory) == k:
                youngest = max(slot for slot, (e, _) in enumerate(memory) if e == minimum)
                del memory[youngest]
            memory.append((score, t))
    return snapshots
