"""The causal depthwise convolution as its equation reads: a sum of k shifted, scaled inputs.

    y_t = act( sum_{j=1..k} weight_j x_{t-k+j} + bias )

Any device, any floating dtype, differentiable (also twice) by autograd. Symbols and shapes are
those of the package's docstring.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype


def causal_conv1d_reference(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, "d"] | None,
    initial_state: Float[Tensor, "b k-1 d"] | None,
    activation: str | None,
) -> Float[Tensor, "b l d"]:
    """Output in the dtype of `x`; see `causal_conv1d` for the arguments."""
    dtype = compute_dtype(x)
    b, l, d = x.shape
    k = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(b, k - 1, d)
    padded = torch.cat([initial_state.to(dtype), x.to(dtype)], dim=1)
    taps = weight.to(dtype)
    y = sum(padded[:, j : j + l] * taps[:, j] for j in range(k))
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype)
