"""Innovation of one position: a matrix product with the outputs before it.

    e = mean_d (y - sum_{j=1..taps} w_j y_{-j})^2

Decoding on a CPU reads one token at a time; a pass a tap would cost more than the arithmetic. Any
device, differentiable by autograd; where nobody differentiates or traces, the plain mean is one
compiled loop. y (b, 1, d); w (taps,); past (b, taps, d), oldest first.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype, widened
from bmojo_core.ops._numpy import is_plain, may_be_written, nobody_watches, run_on


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


def runs_compiled(y: Tensor, taps: int, weights: Tensor | None, past: Tensor | None) -> bool:
    """Whether `innovation_compiled_step` may take these: of the right shapes, among the rest."""
    if weights is not None or getattr(y, "ndim", 0) != 3 or type(taps) is not int or taps < 1:
        return False
    b, _, d = y.shape
    fit = is_plain(y, b, 1, d) and is_plain(past, b, taps, d)
    return fit and b * d > 0 and nobody_watches()


def innovation_compiled_step(
    y: Float[Tensor, "b 1 d"], past: Float[Tensor, "b taps d"]
) -> Float[Tensor, "b 1"]:
    """The same with the plain mean as one loop, without gradients."""
    from bmojo_core.ops.innovation import cpu_kernels

    e = y.new_empty(y.shape[0], 1)
    run_on(cpu_kernels.innovation_step, y, past, e, *past.shape)
    return e


def insert_compiled(
    best: tuple[Tensor, Tensor, Tensor, Tensor], token: tuple[Tensor, Tensor, Tensor, Tensor]
) -> bool:
    """Algorithm 1, step 4, in place as one loop, where that may be; False where nothing was done.

    Keys and values (b, m, g, p), scores and positions (b, m); the token's (b, 1, ..).
    """
    k, v, score, position = token
    plain = k.dtype is v.dtype is score.dtype is torch.float32 and position.dtype is torch.int64
    same = all(
        a.dtype is b.dtype and a.is_cpu and a.shape == (b.shape[0], 1, *b.shape[2:])
        for a, b in zip(token, best, strict=True)
    )
    followed = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    if followed or not (plain and same and best[2].shape[1] and may_be_written(*best)):
        return False
    from bmojo_core.ops.innovation import cpu_kernels

    b, m = best[2].shape
    run_on(cpu_kernels.insert_one, *best, *token, b, m, k[0].numel())
    return True
