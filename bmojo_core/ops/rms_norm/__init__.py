"""Root mean square norm:  out = weight * h / sqrt(mean_d h^2 + eps).

torch's own, except where a CPU decodes one token at a time: there its nine small operations cost
more than the arithmetic, and one compiled loop takes their place.  Symbols: b batch, l, d width.
"""

from jaxtyping import Float
from torch import Tensor, nn

from bmojo_core.ops._numpy import is_plain, nobody_listens, nobody_watches, run_on

__all__ = ["rms_norm"]


def rms_norm(h: Float[Tensor, "b l d"], norm: nn.RMSNorm) -> Float[Tensor, "b l d"]:
    """``norm(h)``, for a norm with weights over the last axis.

    Parameters
    ----------
    h : (b, l, d)
        The residual stream.
    norm
        The module that holds weight (d,) and eps.
    """
    if h.shape[1] != 1 or type(norm) is not nn.RMSNorm:
        return norm(h)  # also where someone has put another norm there
    b, _, d = h.shape
    fit = norm.eps is not None and is_plain(h, b, 1, d) and is_plain(norm.weight, d)
    if not (fit and nobody_watches() and nobody_listens(norm)):
        return norm(h)
    from bmojo_core.ops.rms_norm.cpu_kernels import norm_step

    out = h.new_empty(h.shape)
    run_on(norm_step, h, norm.weight, out, norm.eps, b, d)
    return out
