"""The scalar scan as its equation reads: one step of the recurrence per turn of a loop.

    X_t = exp(delta_t A) X_{t-1} + delta_t u_t B_t^T ;   y_t = (X_t C_t + D u_t) silu(z_t)

Any device, any floating dtype, differentiable (also twice) by autograd. Symbols and shapes are
those of the package's docstring.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype
from bmojo_core.ops.selective_scan.reference import step_size


def scalar_scan_reference(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, "d"] | None,
    z: Float[Tensor, "b l d"] | None,
    delta_bias: Float[Tensor, "h"] | None,
    delta_softplus: bool,
    initial_state: Float[Tensor, "b d n"] | None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """Output in the dtype of `u`, and last state; see `scalar_scan` for the arguments."""
    dtype = compute_dtype(u)
    u_wide, A, B, C = (t.to(dtype) for t in (u, A, B, C))
    delta = step_size(delta.to(dtype), delta_bias, delta_softplus)
    heads = u_wide.unflatten(-1, (A.shape[0], -1))  # (b, l, h, p)
    X = u_wide.new_zeros(*heads[:, 0].shape, B.shape[-1])
    if initial_state is not None:
        X = X + initial_state.to(dtype).unflatten(1, heads.shape[2:])
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t] * A)[..., None, None]
        drive = (delta[:, t, :, None] * heads[:, t])[..., None] * B[:, t, None, None, :]
        X = decay * X + drive
        outputs.append((X * C[:, t, None, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1).flatten(2)
    if D is not None:
        y = y + D.to(dtype) * u_wide
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), X.flatten(1, 2)
