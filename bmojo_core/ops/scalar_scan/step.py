"""One position of the scalar scan: the recurrence itself, in as few operations as it takes.

    X_1 = exp(delta A) X_0 + delta u B^T ;   y = (X_1 C + D u) silu(z)

Decoding reads one token at a time; setting up chunks would cost more than the step. Any device and
floating dtype, differentiable by autograd. Symbols are those of the package's docstring.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype, outside_autocast, widened
from bmojo_core.ops.selective_scan.reference import step_size


@outside_autocast
def scalar_scan_step(
    u: Float[Tensor, "b 1 d"],
    delta: Float[Tensor, "b 1 h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b 1 n"],
    C: Float[Tensor, "b 1 n"],
    D: Float[Tensor, "d"] | None,
    z: Float[Tensor, "b 1 d"] | None,
    delta_bias: Float[Tensor, "h"] | None,
    delta_softplus: bool,
    initial_state: Float[Tensor, "b d n"] | None,
) -> tuple[Float[Tensor, "b 1 d"], Float[Tensor, "b d n"]]:
    """Output in the dtype of `u`, and next state; see `scalar_scan` for the arguments."""
    dtype = compute_dtype(u)
    out_dtype, p = u.dtype, u.shape[-1] // A.shape[0]
    u, delta, A, B, C, D, z, X_0 = widened(dtype, u, delta, A, B, C, D, z, initial_state)
    delta = step_size(delta, delta_bias, delta_softplus)
    X = (delta.repeat_interleave(p, -1) * u).mT * B  # (b, d, 1) times (b, 1, n)
    if X_0 is not None:
        X = torch.addcmul(X, torch.exp(delta * A).repeat_interleave(p, -1).mT, X_0)
    y = C @ X.mT
    if D is not None:
        y = torch.addcmul(y, u, D)
    if z is not None:
        y = y * F.silu(z)
    return y.to(out_dtype), X
