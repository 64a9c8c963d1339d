"""Innovation of one position: a matrix product with the outputs before it.

    e = mean_d (y - sum_{j=1..taps} w_j y_{-j})^2

Decoding on a CPU reads one token at a time; a pass a tap would cost more than the arithmetic. Any
device, differentiable by autograd. y (b, 1, d); w (taps,); past (b, taps, d), oldest first.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype, widened


def innovation_step(
    y: Float[Tensor, "b 1 d"],
    weights: Float[Tensor, "taps"] | None,
    past: Float[Tensor, "b taps d"] | None,
) -> Float[Tensor, "b 1"]:
    """See ``bmojo_core.ops.innovation``; without weights the prediction is the plain mean."""
    error, weights, past = widened(compute_dtype(y), y, weights, past)
    if past is not None and weights is None:
        error = error - past.mean(dim=1, keepdim=True)
    elif past is not None:
        error = error - weights.flip(0)[None] @ past
    return torch.linalg.vecdot(error, error) / error.shape[-1]
