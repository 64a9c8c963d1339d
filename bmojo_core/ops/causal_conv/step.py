"""One position of the causal convolution: a dot product over the k last inputs.

    y = act( sum_{j=1..k} weight_j x_{1-k+j} + bias )

Decoding on a CPU reads one token at a time; setting a loop up would cost more than the loop. Any
device and floating dtype, differentiable by autograd. Where nobody differentiates or traces, the
model's case (all arguments, silu) is one compiled loop. Symbols are those of the package.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype, widened
from bmojo_core.ops._numpy import is_plain, nobody_watches, run_on


def causal_conv1d_step(
    x: Float[Tensor, "b 1 d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, "d"] | None,
    initial_state: Float[Tensor, "b k-1 d"] | None,
    activation: str | None,
) -> Float[Tensor, "b 1 d"]:
    """Output in the dtype of `x`; see `causal_conv1d` for the arguments."""
    dtype = compute_dtype(x)
    out_dtype = x.dtype
    x, taps, bias, past = widened(dtype, x, weight, bias, initial_state)
    if past is None:  # the inputs before the first are zero
        y = x * taps[:, -1]
    else:
        y = (torch.cat([past, x], dim=1) * taps.mT).sum(1, keepdim=True)
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    return y.to(out_dtype)


def runs_compiled(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, activation: str | None
) -> bool:
    """Whether `causal_conv1d_compiled_step` may take these: of the right shapes, among the rest."""
    if activation != "silu" or getattr(x, "ndim", 0) != 3 or getattr(weight, "ndim", 0) != 2:
        return False
    b, k, d = x.shape[0], weight.shape[1], x.shape[2]
    fit = b * d * k > 0 and is_plain(x, b, 1, d) and is_plain(weight, d, k) and is_plain(bias, d)
    return fit and is_plain(past, b, k - 1, d) and nobody_watches()


def causal_conv1d_compiled_step(
    x: Float[Tensor, "b 1 d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, "d"],
    past: Float[Tensor, "b k-1 d"],
) -> Float[Tensor, "b 1 d"]:
    """The same with silu as one loop, without gradients."""
    from bmojo_core.ops.causal_conv.cpu_kernels import filter_step

    y = x.new_empty(x.shape)
    run_on(filter_step, x, weight, bias, past, y, x.shape[0], *weight.shape)
    return y
