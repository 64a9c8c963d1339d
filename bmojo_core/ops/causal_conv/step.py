"""One position of the causal convolution: a dot product over the k last inputs.

    y = act( sum_{j=1..k} weight_j x_{1-k+j} + bias )

Decoding on a CPU reads one token at a time; setting a loop up would cost more than the loop. Any
device and floating dtype, differentiable by autograd. Symbols are those of the package's docstring.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype, widened


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
