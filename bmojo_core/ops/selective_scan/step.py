"""One position of the selective scan: the recurrence itself, in as few operations as it takes.

    x_1 = exp(delta A) x_0 + delta B u ;   y = (C . x_1 + D u) silu(z)

Decoding on a CPU reads one token at a time; setting a loop up would cost more than the loop. Any
device and floating dtype, differentiable by autograd. Where nobody differentiates or traces, the
model's case (all arguments, n a multiple of 16) is one compiled loop. Symbols are those of the
package's docstring.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype, outside_autocast, widened
from bmojo_core.ops._numpy import is_plain, nobody_watches, run_on
from bmojo_core.ops.selective_scan.reference import step_size


@outside_autocast
def selective_scan_step(
    u: Float[Tensor, "b 1 d"],
    delta: Float[Tensor, "b 1 d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b 1 n"],
    C: Float[Tensor, "b 1 n"],
    D: Float[Tensor, "d"] | None,
    z: Float[Tensor, "b 1 d"] | None,
    delta_bias: Float[Tensor, "d"] | None,
    delta_softplus: bool,
    initial_state: Float[Tensor, "b d n"] | None,
) -> tuple[Float[Tensor, "b 1 d"], Float[Tensor, "b d n"]]:
    """Output in the dtype of `u`, and next state; see `selective_scan` for the arguments."""
    dtype = compute_dtype(u)
    out_dtype = u.dtype
    u, delta, A, B, C, D, z, x_0 = widened(dtype, u, delta, A, B, C, D, z, initial_state)
    delta = step_size(delta, delta_bias, delta_softplus)
    x = (delta * u).mT * B  # (b, d, 1) times (b, 1, n)
    if x_0 is not None:
        x = torch.addcmul(x, torch.exp(delta.mT * A), x_0)
    y = C @ x.mT
    if D is not None:
        y = torch.addcmul(y, u, D)
    if z is not None:
        y = y * F.silu(z)
    return y.to(out_dtype), x


def runs_compiled(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
) -> bool:  # fmt: skip
    """Whether `selective_scan_compiled_step` may take these: right shapes, among the rest."""
    if not delta_softplus or getattr(u, "ndim", 0) != 3 or getattr(A, "ndim", 0) != 2:
        return False
    b, (d, n) = u.shape[0], A.shape
    return (
        is_plain(u, b, 1, d) and is_plain(delta, b, 1, d) and is_plain(z, b, 1, d)
        and is_plain(B, b, 1, n) and is_plain(C, b, 1, n) and is_plain(A, d, n)
        and is_plain(D, d) and is_plain(delta_bias, d) and is_plain(initial_state, b, d, n)
        and b * d * n > 0 and n % 16 == 0 and nobody_watches()
    )  # fmt: skip


def selective_scan_compiled_step(
    u: Float[Tensor, "b 1 d"],
    delta: Float[Tensor, "b 1 d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b 1 n"],
    C: Float[Tensor, "b 1 n"],
    D: Float[Tensor, "d"],
    z: Float[Tensor, "b 1 d"],
    delta_bias: Float[Tensor, "d"],
    initial_state: Float[Tensor, "b d n"],
) -> tuple[Float[Tensor, "b 1 d"], Float[Tensor, "b d n"]]:
    """The same, delta through bias and softplus, as one loop, without gradients."""
    from bmojo_core.ops.selective_scan.step_kernels import scan_step

    y, x = u.new_empty(u.shape), u.new_empty(initial_state.shape)
    tensors = (u, delta, delta_bias, A, B, C, D, z, initial_state, y, x)
    run_on(scan_step, *tensors, *initial_state.shape)
    return y, x
