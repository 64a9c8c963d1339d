"""Scalar scan: the fading memory whose channels forget alike, head by head.

    X_t = exp(delta_t A) X_{t-1} + delta_t u_t B_t^T        (state of one head, p x n)
    y_t = (X_t C_t + D u_t) silu(z_t)                       (output; the gate when z is given)

One decay a head, where the selective scan has one for each channel and state: written out, the
outputs of a stretch of tokens are then a masked attention without a softmax, and matrix units can
compute it (the state-space duality of Mamba-2).

Symbols
-------
h, p   heads, channels of a head: d = h p, head by head
u      (b, l, d)  input                     delta  (b, l, h)  step size
A      (h,)       rate of each head         z      (b, l, d)  gate
B, C   (b, l, n)  input and output vectors, shared by all heads
D      (d,)       direct term
X      (b, d, n)  state, the selective scan's shape; `initial_state` is X_0, `last_state` X_l
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bmojo_core.ops._checks import check_backend, check_companions, check_rank, check_shape
from bmojo_core.ops.scalar_scan.reference import scalar_scan_reference
from bmojo_core.ops.scalar_scan.step import scalar_scan_step

__all__ = ["scalar_scan"]

BACKENDS = ("auto", "reference", "cpu", "gpu")


def scalar_scan(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, "d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    delta_bias: Float[Tensor, "h"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Tensor, "b d n"] | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b l d"] | tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """Run the state-space recurrence with one decay a head over a batch of sequences.

    It is `selective_scan` with A and delta constant within a head.

    Parameters
    ----------
    u : (b, l, d)
        Input sequence; d = h p channels, head by head.
    delta : (b, l, h)
        Step sizes. Where the effective step (after bias and softplus) is 0 the state is held
        exactly; softplus never gives 0, so callers that pad apply it themselves.
    A : (h,)
        Continuous-time eigenvalue of each head; negative for a fading memory.
    B, C : (b, l, n)
        Input and output vectors.
    D : (d,), optional
        Direct term.
    z : (b, l, d), optional
        Gate: the output is multiplied by silu(z).
    delta_bias : (h,), optional
        Added to `delta` before the softplus.
    delta_softplus : bool
        Apply softplus to `delta + delta_bias`.
    initial_state : (b, d, n), optional
        State before the first position; zero when absent.
    return_last_state : bool
        Also return the state after the last position.
    backend : {"auto", "reference", "cpu", "gpu"}
        "auto" takes "reference" for float64; otherwise "gpu" on CUDA (where it covers the sizes,
        else "cpu", which is plain torch), and on the CPU "cpu" or, for a single position
        (decoding), the plain equation; elsewhere "reference".

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

    Notes
    -----
    Float16 and bfloat16 inputs are accumulated in float32; on the GPU they are also what its matrix
    units multiply. Gradients flow to every tensor argument, also from `last_state` to
    `initial_state`. NaN is not looked for; it spreads to later outputs and, within the stretch of
    tokens that is computed together, to earlier ones. Source: Dao and Gu, "Transformers are SSMs"
    (2024), sections 3 and 6.
    """
    b, l, d = check_rank("u", u, "b l d")
    (h,) = check_rank("A", A, "h")
    _, _, n = check_rank("B", B, "b l n")
    if d % h:
        raise ValueError(f"A has shape {tuple(A.shape)}; expected (h,) with h a divisor of d={d}")
    shapes = {
        "delta": (delta, {"b": b, "l": l, "h": h}),
        "A": (A, {"h": h}),
        "B": (B, {"b": b, "l": l, "n": n}),
        "C": (C, {"b": b, "l": l, "n": n}),
        "D": (D, {"d": d}),
        "z": (z, {"b": b, "l": l, "d": d}),
        "delta_bias": (delta_bias, {"h": h}),
        "initial_state": (initial_state, {"b": b, "d": d, "n": n}),
    }
    for name, (tensor, expected) in shapes.items():
        check_shape(name, tensor, expected)
    check_companions("u", u, {name: tensor for name, (tensor, _) in shapes.items()})
    check_backend(backend, BACKENDS, u.device)
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    y, last_state = _dispatch(_resolve(backend, u, d // h, n), arguments)
    return (y, last_state) if return_last_state else y


def _resolve(backend: str, u: Tensor, p: int, n: int) -> str:
    """The backend that "auto" stands for, given where, what and how wide the arguments are."""
    if backend != "auto":
        return backend
    if u.dtype == torch.float64 or u.device.type not in ("cpu", "cuda"):
        return "reference"
    if u.shape[1] == 1:
        return "step"
    if u.device.type == "cpu":
        return "cpu"
    from bmojo_core.ops.scalar_scan.gpu import covers

    return "gpu" if covers(p, n) else "cpu"


def _dispatch(backend: str, arguments: tuple) -> tuple[Tensor, Tensor]:
    """Call one backend. Fast ones are imported here, so that importing this package is cheap."""
    if backend == "cpu":
        from bmojo_core.ops.scalar_scan.cpu import scalar_scan_cpu

        return scalar_scan_cpu(*arguments)
    if backend == "gpu":
        from bmojo_core.ops.scalar_scan.gpu import scalar_scan_gpu

        return scalar_scan_gpu(*arguments)
    if backend == "step":
        return scalar_scan_step(*arguments)
    return scalar_scan_reference(*arguments)
