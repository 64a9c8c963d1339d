"""Causal depthwise convolution: each channel is filtered by its own k taps, looking back only.

    y_t = act( sum_{j=1..k} weight_j x_{t-k+j} + bias ),   act = silu or none

Symbols
-------
x       (b, l, d)    input; `initial_state` (b, k-1, d) holds the k-1 inputs before it (else zeros)
weight  (d, k)       taps, the newest input's last        bias  (d,)
y       (b, l, d)    output
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import (
    check_backend,
    check_companions,
    check_rank,
    check_shape,
    is_one_step,
)
from bmojo_core.ops.causal_conv.reference import causal_conv1d_reference
from bmojo_core.ops.causal_conv.step import (
    causal_conv1d_compiled_step,
    causal_conv1d_step,
    runs_compiled,
)

__all__ = ["causal_conv1d"]

BACKENDS = ("auto", "reference", "cpu", "gpu")
ACTIVATIONS = (None, "silu")


def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, "d"] | None = None,
    initial_state: Float[Tensor, "b k-1 d"] | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b l d"]:
    """Filter every channel of `x` with its own causal taps.

    Parameters
    ----------
    x : (b, l, d)
        Input sequence.
    weight : (d, k)
        Taps; the last multiplies the newest input.
    bias : (d,), optional
        Added before the activation.
    initial_state : (b, k-1, d), optional
        The k-1 inputs before `x`, oldest first; zeros when absent.
    activation : {None, "silu"}
        Applied to the output.
    backend : {"auto", "reference", "cpu", "gpu"}
        "auto" takes "gpu" on CUDA and "cpu" on the CPU, except for float64, which takes
        "reference", and a single position (decoding), which takes the plain equation on the CPU
        and under torch.compile; elsewhere "reference".

    Returns
    -------
    y : (b, l, d)
        Output, in the dtype of `x`.

    Raises
    ------
    ValueError
        On a wrong shape, dtype, device, activation or backend, or a backend that cannot run there.

    Notes
    -----
    Float16 and bfloat16 inputs are accumulated in float32. To continue a sequence, pass the last
    k-1 rows of (initial_state, x) as the next call's `initial_state`.
    """
    if backend == "auto" and runs_compiled(x, weight, bias, initial_state, activation):
        return causal_conv1d_compiled_step(x, weight, bias, initial_state)
    b, _, d = check_rank("x", x, "b l d")
    _, k = check_rank("weight", weight, "d k")
    check_shape("weight", weight, {"d": d, "k": k})
    check_shape("bias", bias, {"d": d})
    check_shape("initial_state", initial_state, {"b": b, "k-1": k - 1, "d": d})
    companions = {"weight": weight, "bias": bias, "initial_state": initial_state}
    check_companions("x", x, companions)
    check_backend(backend, BACKENDS, x.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed: None, 'silu'")
    arguments = (x, weight, bias, initial_state, activation)
    fast = x.dtype != torch.float64
    if backend == "auto" and fast and is_one_step(x):
        return causal_conv1d_step(*arguments)
    if backend == "gpu" or (backend == "auto" and fast and x.device.type == "cuda"):
        from bmojo_core.ops.causal_conv.gpu import causal_conv1d_gpu

        return causal_conv1d_gpu(*arguments)
    if backend == "cpu" or (backend == "auto" and fast and x.device.type == "cpu"):
        from bmojo_core.ops.causal_conv.cpu import causal_conv1d_cpu

        return causal_conv1d_cpu(*arguments)
    return causal_conv1d_reference(*arguments)
