r"""Innovation of the fading memory, and the running selection of its largest values.

    e_t = mean_d (y_t - sum_{j=1..taps} w_j y_{t-j})^2                               (innovation)
    M_i = the k positions t < i * chunk with the largest e_t                         (running_top_k)
    M(a then b) = top_k(M(a) + M(b))                                                 (merge_top_k)

The innovation says how badly a running average of the last SSM outputs predicts the new one; the
tokens it surprised most are the ones worth keeping word for word (the eidetic memory).

Symbols
-------
y        (b, l, d)      outputs of the SSM (the fading memory)
weights  (taps,)        the fixed predictor, a running average
e        (b, l)         innovation, the score of a token
k                       capacity of the eidetic memory (m_e in the paper)
chunk                   tokens that share one memory (1: the memory moves with every token)
index    (b, c, k)      positions remembered when chunk i begins, c = ceil(l / chunk)
valid    (b, c, k)      which of the k slots hold a token

Source: B'MOJO (arXiv 2407.06324), Algorithm 1 steps 3 and 4, and appendix B.2.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bmojo_core.ops._checks import (
    check_backend,
    check_companions,
    check_rank,
    check_shape,
    compute_dtype,
    is_one_step,
)
from bmojo_core.ops.innovation.reference import innovation_reference, running_top_k_reference
from bmojo_core.ops.innovation.step import (
    innovation_compiled_step,
    innovation_step,
    runs_compiled,
)
from bmojo_core.ops.innovation.top_k import merge_top_k, running_top_k_parallel, top_k

__all__ = [
    "innovation",
    "merge_top_k",
    "running_top_k",
    "running_top_k_parallel",
    "top_k",
]


def innovation(
    y: Float[Tensor, "b l d"],
    taps: int = 4,
    weights: Float[Tensor, "taps"] | None = None,
    past: Float[Tensor, "b taps d"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "b l"]:
    """Squared error of a running average of the previous outputs, averaged over channels.

    e_t = mean_d (y_t - sum_{j=1..taps} weights[j-1] y_{t-j})^2

    Parameters
    ----------
    y : (b, l, d)
        SSM outputs; b and l at least 1.
    taps : int
        How many previous outputs the prediction averages, at least 1.
    weights : (taps,), optional
        ``weights[0]`` multiplies the most recent output. Default: 1 / taps each.
    past : (b, taps, d), optional
        The ``taps`` outputs before ``y``, oldest first (``past[:, -1]`` precedes ``y[:, 0]``).
        Default: zeros.
    backend : "auto", "reference", "cpu" or "gpu"
        "auto" takes "gpu" for CUDA tensors; for all others the plain equation where l is 1
        (decoding) or y is float64 (so that gradients can be differentiated again), else "cpu".

    Returns
    -------
    (b, l)
        In y's dtype; float32 for half-precision y, because scores that are compared with each
        other must not be rounded into ties. Differentiable in y, weights and past.

    Raises
    ------
    ValueError
        Wrong shape, dtype or device, empty batch or sequence, taps < 1, unknown backend.

    Notes
    -----
    NaN is not looked for; it spreads to the taps + 1 scores that read it.

    Source: B'MOJO, Algorithm 1 step 3; the fixed average follows the authors' answer to reviewers.
    """
    if backend == "auto" and runs_compiled(y, taps, weights, past):
        return innovation_compiled_step(y, past)
    b, _, d = check_rank("y", y, "b l d")
    _check_count("taps", taps, 1)
    check_shape("weights", weights, {"taps": taps})
    check_shape("past", past, {"b": b, "taps": taps, "d": d})
    check_companions("y", y, {"weights": weights, "past": past})
    check_backend(backend, ("auto", "reference", "cpu", "gpu"), y.device)
    if backend == "auto" and is_one_step(y):
        return innovation_step(y, weights, past)
    if weights is None:
        weights = torch.full((taps,), 1.0 / taps, dtype=compute_dtype(y), device=y.device)
    exact = backend == "auto" and y.dtype == torch.float64 and not y.is_cuda
    if backend == "reference" or exact:
        return innovation_reference(y, weights, past)
    if backend == "gpu" or (backend == "auto" and y.is_cuda):
        from bmojo_core.ops.innovation.gpu import innovation_gpu

        return innovation_gpu(y, weights, past)
    from bmojo_core.ops.innovation.cpu import innovation_cpu

    return innovation_cpu(y, weights, past)


def running_top_k(
    scores: Float[Tensor, "b l"], k: int, chunk: int, *, backend: str = "auto"
) -> tuple[Int[Tensor, "b c k"], Bool[Tensor, "b c k"]]:
    """Positions in the eidetic memory at the beginning of every chunk.

    Slot i holds what Algorithm 1 remembers after positions 0 .. i * chunk - 1: a token enters when
    its score is larger than the smallest one in a full memory, and takes its place.

    Parameters
    ----------
    scores : (b, l)
        Innovation of each token; b and l at least 1. ``-inf`` marks tokens never to be stored
        (padding); NaN is larger than nothing and is not stored either.
    k : int
        Capacity, at least 0. May exceed l.
    chunk : int
        Tokens that share one memory, at least 1. 1 gives the memory before every token.
    backend : "auto", "reference", "cpu", "parallel" or "gpu"
        "cpu" is Algorithm 1's loop compiled; "parallel" is an associative scan in plain torch on
        any device. "auto" takes "gpu" for CUDA tensors, "cpu" for CPU tensors, "parallel" for
        other devices. All return identical results.

    Returns
    -------
    index : (b, c, k) int64
        Positions, ascending, c = ceil(l / chunk); 0 in empty slots.
    valid : (b, c, k) bool
        True for filled slots, which stand before the empty ones.

    Raises
    ------
    ValueError
        Wrong shape, dtype or device, empty batch or sequence, k < 0, chunk < 1, unknown backend.

    Notes
    -----
    Equal scores: the older token stays (a newcomer must be strictly larger, and among equal minima
    the youngest leaves). The result carries no gradient.

    Source: B'MOJO, Algorithm 1 step 4; appendix B.2 for chunks.
    """
    check_rank("scores", scores, "b l")
    _check_count("k", k, 0)
    _check_count("chunk", chunk, 1)
    if backend != "parallel":  # the one that runs on every device
        check_backend(backend, ("auto", "reference", "cpu", "parallel", "gpu"), scores.device)
    scores = scores.detach()
    if backend == "reference":
        return running_top_k_reference(scores, k, chunk)
    if backend == "gpu" or (backend == "auto" and scores.is_cuda):
        from bmojo_core.ops.innovation.gpu import running_top_k_gpu

        return running_top_k_gpu(scores, k, chunk)
    if backend == "cpu" or (backend == "auto" and scores.device.type == "cpu"):
        from bmojo_core.ops.innovation.cpu import running_top_k_cpu

        return running_top_k_cpu(scores, k, chunk)
    return running_top_k_parallel(scores, k, chunk)


def _check_count(name: str, value: int, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < smallest:
        raise ValueError(f"{name} must be an integer >= {smallest}; got {value!r}")
