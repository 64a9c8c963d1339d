"""The selective scan as its equation reads: one step of the recurrence per turn of a loop.

    x_t = exp(delta_t A) x_{t-1} + delta_t B_t u_t ;   y_t = (C_t . x_t + D u_t) silu(z_t)

Any device, any floating dtype, differentiable (also twice) by autograd. Symbols and shapes are
those of the package's docstring.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype


def selective_scan_reference(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, "d"] | None,
    z: Float[Tensor, "b l d"] | None,
    delta_bias: Float[Tensor, "d"] | None,
    delta_softplus: bool,
    initial_state: Float[Tensor, "b d n"] | None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """Output in the dtype of `u`, and last state; see `selective_scan` for the arguments."""
    dtype = compute_dtype(u)
    u_wide, A, B, C = (t.to(dtype) for t in (u, A, B, C))
    delta = step_size(delta.to(dtype), delta_bias, delta_softplus)
    x = u_wide.new_zeros(*delta[:, 0].shape, A.shape[1])
    if initial_state is not None:
        x = x + initial_state.to(dtype)
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        drive = (delta[:, t] * u_wide[:, t])[:, :, None] * B[:, t, None, :]
        x = decay * x + drive
        outputs.append((x * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype) * u_wide
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), x


def step_size(
    delta: Float[Tensor, "b l d"], delta_bias: Float[Tensor, "d"] | None, delta_softplus: bool
) -> Float[Tensor, "b l d"]:
    """Effective step size: `delta + delta_bias`, through a softplus when asked.

    Of channels here, of heads in the scalar scan.
    """
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)
    return F.softplus(delta) if delta_softplus else delta
