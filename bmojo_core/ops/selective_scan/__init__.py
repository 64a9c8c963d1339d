"""Selective scan: a linear state-space model whose matrices depend on the input.

    x_t = exp(delta_t A) x_{t-1} + delta_t B_t u_t          (state, one per channel)
    y_t = (C_t . x_t + D u_t) silu(z_t)                     (output; the gate when z is given)

Symbols
-------
u      (b, l, d)  input                     delta  (b, l, d)  step size
A      (d, n)     diagonal of the continuous-time state matrix of each channel
B, C   (b, l, n)  input and output vectors, shared by all channels
D      (d,)       direct term               z      (b, l, d)  gate
x      (b, d, n)  state; `initial_state` is x_0 and `last_state` is x_l
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
from bmojo_core.ops.selective_scan.reference import selective_scan_reference
from bmojo_core.ops.selective_scan.step import (
    runs_compiled,
    selective_scan_compiled_step,
    selective_scan_step,
)

__all__ = ["selective_scan"]

BACKENDS = ("auto", "reference", "cpu", "gpu", "mamba_ssm")


def selective_scan(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, "d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    delta_bias: Float[Tensor, "d"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Tensor, "b d n"] | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b l d"] | tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """Run the selective state-space recurrence over a batch of sequences.

    Parameters
    ----------
    u : (b, l, d)
        Input sequence.
    delta : (b, l, d)
        Step sizes. Where the effective step (after bias and softplus) is 0 the state is held
        exactly; softplus never gives 0, so callers that pad apply it themselves.
    A : (d, n)
        Continuous-time eigenvalues; negative for a fading memory.
    B, C : (b, l, n)
        Input and output vectors.
    D : (d,), optional
        Direct term.
    z : (b, l, d), optional
        Gate: the output is multiplied by silu(z).
    delta_bias : (d,), optional
        Added to `delta` before the softplus.
    delta_softplus : bool
        Apply softplus to `delta + delta_bias`.
    initial_state : (b, d, n), optional
        State before the first position; zero when absent.
    return_last_state : bool
        Also return the state after the last position.
    backend : {"auto", "reference", "cpu", "gpu", "mamba_ssm"}
        "auto" takes "gpu" on CUDA and "cpu" on the CPU, except for float64 (so that gradients can
        themselves be differentiated), which takes "reference", and, on the CPU, a single position
        (decoding), which takes the plain equation; elsewhere "reference".

    Returns
    -------
    y : (b, l, d)
        Output, in the dtype of `u`.
    last_state : (b, d, n)
        Only with `return_last_state`: float64 for float64 inputs, float32 for all others.

    Raises
    ------
    ValueError
        On a wrong shape, dtype, device or backend name, or a backend that cannot run there.
    ImportError
        If backend "mamba_ssm" is asked for and the package is not installed.

    Notes
    -----
    Float16 and bfloat16 inputs are accumulated in float32. Gradients flow to every tensor
    argument, also from `last_state` to `initial_state`. NaN is not looked for (an accelerator would
    have to wait for the answer); it spreads to all later outputs of its channel. Source: the
    B'MOJO paper, section 3; the parametrization is that of Mamba.
    """
    given = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    if backend == "auto" and runs_compiled(*given):
        y, last_state = selective_scan_compiled_step(
            u, delta, A, B, C, D, z, delta_bias, initial_state
        )
        return (y, last_state) if return_last_state else y
    b, l, d = check_rank("u", u, "b l d")
    _, n = check_rank("A", A, "d n")
    shapes = {
        "delta": (delta, {"b": b, "l": l, "d": d}),
        "A": (A, {"d": d, "n": n}),
        "B": (B, {"b": b, "l": l, "n": n}),
        "C": (C, {"b": b, "l": l, "n": n}),
        "D": (D, {"d": d}),
        "z": (z, {"b": b, "l": l, "d": d}),
        "delta_bias": (delta_bias, {"d": d}),
        "initial_state": (initial_state, {"b": b, "d": d, "n": n}),
    }
    for name, (tensor, expected) in shapes.items():
        check_shape(name, tensor, expected)
    check_companions("u", u, {name: tensor for name, (tensor, _) in shapes.items()})
    check_backend(backend, BACKENDS, u.device)
    y, last_state = _dispatch(_resolve(backend, u), given)
    return (y, last_state) if return_last_state else y


def _resolve(backend: str, u: Tensor) -> str:
    """The backend that "auto" stands for, given where and what `u` is."""
    if backend != "auto":
        return backend
    if u.dtype == torch.float64 or u.device.type not in ("cpu", "cuda"):
        return "reference"
    if is_one_step(u):
        return "step"
    return "gpu" if u.device.type == "cuda" else "cpu"


def _dispatch(backend: str, arguments: tuple) -> tuple[Tensor, Tensor]:
    """Call one backend. Fast ones are imported here, so that importing this package is cheap."""
    if backend == "cpu":
        from bmojo_core.ops.selective_scan.cpu import selective_scan_cpu

        return selective_scan_cpu(*arguments)
    if backend == "gpu":
        from bmojo_core.ops.selective_scan.gpu import selective_scan_gpu

        return selective_scan_gpu(*arguments)
    if backend == "mamba_ssm":
        from bmojo_core.ops.selective_scan.external import selective_scan_mamba_ssm

        return selective_scan_mamba_ssm(*arguments)
    if backend == "step":
        return selective_scan_step(*arguments)
    return selective_scan_reference(*arguments)
