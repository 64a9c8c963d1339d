r"""The scalar scan by chunks: matrix products within a chunk, a short recurrence between chunks.

With s_ij = sum_{j < k <= i} delta_k A, the sum of log-decays between two positions of a chunk,

    y_i = sum_{j <= i} exp(s_ij) (C_i . B_j) delta_j u_j + exp(s_i) X C_i      (X: state before)
    X'  = exp(s_last) X + sum_j exp(s_last,j) delta_j u_j B_j^T                (state after)

where s_i is the sum from the chunk's beginning. Every exponent is a sum of its own terms, never a
difference of two long sums, so that nothing overflows and nothing cancels. Plain torch, any device
and dtype; differentiable by autograd, which keeps a few tensors of size b l (d + h c + d n / c) for
chunks of c. Symbols and shapes are those of the package's docstring; k counts chunks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import compute_dtype, outside_autocast
from bmojo_core.ops.selective_scan.reference import step_size

CHUNK = 64


@outside_autocast
def scalar_scan_cpu(
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
    wide = (t if t is None else t.to(dtype) for t in (u, delta, A, B, C, D, z, initial_state))
    u_wide, delta, A, B, C, D, z, X = wide
    step = step_size(delta, delta_bias, delta_softplus)
    step = _DenseGradient.apply(step)
    (b, l, d), h, n = u.shape, A.shape[0], B.shape[-1]
    c = min(CHUNK, l)
    X = u_wide.new_zeros(b, h, d // h, n) if X is None else X.unflatten(1, (h, -1))
    drive = (step[..., None] * u_wide.unflatten(-1, (h, -1))).flatten(2)
    raw, X = _chunked(*(_chunks(t, c) for t in (drive, step * A, B, C)), X)
    y = raw[:, :l]
    if D is not None:
        y = y + D * u_wide
    if z is not None:
        y = y * F.silu(z)
    return y.to(u.dtype), X.flatten(1, 2)


class _DenseGradient(torch.autograd.Function):
    """The identity, whose gradient is laid out as its argument.

    A traced backward pass mistakes the strides that softplus gives to the gradient of a transpose.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone(memory_format=torch.contiguous_format)


def _chunked(
    drive: Float[Tensor, "b k c d"], log_decay: Float[Tensor, "b k c h"],
    B: Float[Tensor, "b k c n"], C: Float[Tensor, "b k c n"], X: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b kc d"], Float[Tensor, "b h p n"]]:  # fmt: skip
    """The two equations above, without D and z; `drive` is delta u."""
    a = log_decay.transpose(2, 3)  # (b, k, h, c)
    v = drive.unflatten(-1, (a.shape[2], -1)).transpose(2, 3)  # (b, k, h, c, p)
    s = segment_sums(a)
    since_begin = a.cumsum(-1)
    weights = (C @ B.mT)[:, :, None] * s.exp()  # (b, k, h, c, c)
    to_end = s[..., -1, :].exp()  # (b, k, h, c)
    added = (to_end[..., None] * v).mT @ B[:, :, None]  # (b, k, h, p, n)
    fade = since_begin[..., -1, None, None].exp()
    before = []
    for chunk_fade, chunk_added in zip(fade.unbind(1), added.unbind(1), strict=True):
        before.append(X)
        X = torch.addcmul(chunk_added, chunk_fade, X)
    carried = C[:, :, None] @ torch.stack(before, 1).mT  # (b, k, h, c, p)
    y = weights @ v + since_begin.exp()[..., None] * carried
    return y.transpose(2, 3).flatten(3).flatten(1, 2), X


def segment_sums(a: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c c"]:
    """s[i, j] = a_{j+1} + .. + a_i for j <= i, and -inf above the diagonal."""
    c = a.shape[-1]
    square = torch.ones(c, c, dtype=torch.bool, device=a.device)
    terms = a[..., None].expand(*a.shape, c).masked_fill(square.triu(), 0.0)  # a_i where j < i
    return terms.cumsum(-2).masked_fill(square.triu(1), -torch.inf)


def _chunks(t: Float[Tensor, "b l x"], c: int) -> Float[Tensor, "b k c x"]:
    """In chunks; zeros fill the last one, and steps of zero hold the state."""
    return F.pad(t, (0, 0, 0, -t.shape[1] % c)).unflatten(1, (-1, c))
