"""Tensors as numpy arrays or addresses, for compiled loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad


def as_arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """Contiguous numpy views (copies where a tensor is strided).

    ``Tensor.numpy`` is quick, but fixes the size of the storage for good, and sharded training has
    to free gathered parameters; DLPack, three microseconds slower, does not.
    """
    whole = (t.detach().contiguous() for t in tensors)
    if dist.is_available() and dist.is_initialized():
        return tuple(np.from_dlpack(t) for t in whole)
    return tuple(t.numpy() for t in whole)


def run_on(kernel: Callable[..., None], *arguments: Tensor | float) -> None:
    """Call a loop with the address of each tensor (of a copy where one is strided) in its place.

    Tensors to be written must be whole.
    """
    whole = [x.contiguous() if isinstance(x, Tensor) else x for x in arguments]
    kernel(*[x.data_ptr() if isinstance(x, Tensor) else x for x in whole])


def nobody_watches() -> bool:
    """Whether torch need not see what is computed: no graph is traced, no mode or transform is on.

    Loops that are no operators of torch's may then run.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def nobody_listens(module: nn.Module) -> bool:
    """Whether no hook waits for the module to be called: its equation may then run without it."""
    return not any(getattr(module, hooks) for hooks in HOOKS)


def is_plain(tensor: Tensor | None, *shape: int) -> bool:
    """Whether the tensor is float32 on the CPU, of this shape, and asks for no gradient."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.shape == shape
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def may_be_written(*tensors: Tensor) -> bool:
    """Whether loops may write into these behind torch's back: whole, on the CPU, in no graph."""
    return nobody_watches() and all(
        type(t) is Tensor and t.is_cpu and t.is_contiguous() and not t.requires_grad
        for t in tensors
    )
