"""Argument checks shared by the operations: every failure names the argument, what was given
and what is allowed."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_rank(name: str, tensor: Tensor, axes: str) -> tuple[int, ...]:
    """Shape of `tensor`, after checking that it has one axis per word of `axes` and none is empty.

    Raises
    ------
    ValueError
        If `tensor` is not a floating-point tensor, has another number of axes, or an empty one.
    """
    check_floating(name, tensor)
    names = axes.split()
    if tensor.ndim != len(names):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; "
            f"expected {len(names)} axes ({', '.join(names)})"
        )
    for axis, size in zip(names, tensor.shape):
        if size < 1:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; "
                f"axis {axis} is empty, it must be at least 1"
            )
    return tuple(tensor.shape)


def widened(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors in `dtype`; those that are, or are absent, go through untouched.

    `Tensor.to` costs microseconds even where nothing is to do, and a decoded token asks for thirty.
    """
    return tuple(t if t is None or t.dtype is dtype else t.to(dtype) for t in tensors)


def is_one_step(x: Tensor) -> bool:
    """Whether `x` (b, l, d) is a single position for which the plain equation is the fastest.

    That is on a CPU, and where a compiler traces the call: it fuses an equation with its
    neighbours, not a kernel of ours.
    """
    return x.shape[1] == 1 and (x.device.type == "cpu" or torch.compiler.is_compiling())


def check_shape(name: str, tensor: Tensor | None, expected: Mapping[str, int]) -> None:
    """Check that `tensor`, when given, is floating point with exactly the `expected` axes.

    Raises
    ------
    ValueError
        If it is not.
    """
    if tensor is None:
        return
    check_floating(name, tensor)
    if tensor.shape != tuple(expected.values()):
        allowed = ", ".join(f"{axis}={size}" for axis, size in expected.items())
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({allowed})")


def check_floating(name: str, tensor: Tensor) -> None:
    """Check that `tensor` is a real floating-point tensor.

    Raises
    ------
    ValueError
        If it is something else.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    if tensor.dtype not in FLOATING:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {allowed}")


def check_companions(name: str, leader: Tensor, companions: Mapping[str, Tensor | None]) -> None:
    """Check that `companions` are on `leader`'s device and are not wider than its computation.

    A float64 companion of a narrower leader would be rounded silently, so it is refused.

    Raises
    ------
    ValueError
        If devices differ, or a companion is float64 and `leader` is not.
    """
    device = leader.device
    for other, tensor in companions.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{other} is on {tensor.device}; expected {device}, where {name} is")
        if tensor.dtype == torch.float64 and leader.dtype != torch.float64:
            raise ValueError(
                f"{other} is float64 but {name} is {leader.dtype}; convert {other}, "
                f"or {name} to float64"
            )


def check_backend(backend: str, allowed: tuple[str, ...], device: torch.device) -> None:
    """Check that `backend` is one of `allowed` and runs on `device`.

    Raises
    ------
    ValueError
        If the name is unknown, or the backend cannot run where the tensors are.
    """
    if backend not in allowed:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(map(repr, allowed))}")
    needs = {"cpu": "cpu", "auto": device.type, "reference": device.type}.get(backend, "cuda")
    if needs != device.type:
        raise ValueError(
            f"backend {backend!r} needs tensors on {needs}; the tensors given are on {device}"
        )


def outside_autocast(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body`, whose first argument is a tensor, with its products in the dtype it has chosen.

    Autocast would round the factors of every product to half precision, also within an operation
    that has widened them.
    """

    @wraps(body)
    def run(first: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return body(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return body(first, *rest)

    return run


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype an operation accumulates in: float64 for float64, float32 for all narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
