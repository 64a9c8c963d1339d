"""What torch launches around the kernels of one block, and the bytes that moves.

A GPU runs the operations of ``bmojo_core.ops`` as one kernel or a few; everything else that a layer
asks torch for (casts, copies, gathers, masks, additions, matrix products) is one launch each. At a
small width these launches, not arithmetic, are the time of a layer. They can be counted without a
GPU: the block runs on torch's meta device, where nothing is computed, with the five operations
replaced by one allocation an output, and a dispatch mode takes down what passes.

    launches    operations that are neither views nor allocations
    bytes       what they read and write, each tensor once; matrix products apart

The same mode refuses what makes the host wait for the device, or a shape depend on data: capture by
a CUDA graph needs that there is none.

    python benchmarks/dispatch.py --label "what was changed" --out results/dispatch.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.layers import attention, bmojo, eidetic, mamba, selection
from bmojo_core.training import write_json

# Names of operations that only allocate, or only look at what is there.
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias")
FREE += ("_unsafe_view",)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# The host reads a value, or a shape depends on one.
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "unique", "masked_select")
WAITS += ("_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave")


class Dispatched(TorchDispatchMode):
    """Takes down every operation.

    Attributes
    ----------
    launches
        How often each operation ran that needs a kernel.
    moved
        Bytes that these read and wrote, matrix products excepted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refuse_waiting(func, args)
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not is_view(func) and name not in FREE and nbytes(out):
            self.launches[name] += 1
            if name not in PRODUCTS:
                self.moved += nbytes((args, kwargs)) + nbytes(out)
        return out


class NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture; on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refuse_waiting(func, args)
        return func(*args, **(kwargs or {}))


def refuse_waiting(func: torch._ops.OpOverload, args: tuple) -> None:
    """Raise for an operation whose result the host would have to wait for.

    Raises
    ------
    RuntimeError
        Naming the operation.
    """
    name = func._schema.name.removeprefix("aten::")
    by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
        isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
    )
    if name in WAITS or by_mask:
        raise RuntimeError(f"{name} makes the host wait for the device")


def is_view(func: torch._ops.OpOverload) -> bool:
    """Whether the result is an argument's memory, not written to."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def nbytes(tree: Any) -> int:
    """Bytes of all tensors in it."""
    leaves = (x for x in tree_leaves(tree) if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in leaves)


# -- the operations as a GPU runs them: outputs allocated, nothing in between ---------------------


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shapes, dtypes, *tensors):
        ctx.save_for_backward(*tensors)
        made = zip(shapes, dtypes, strict=True)
        return tuple(tensors[0].new_empty(s, dtype=d) for s, d in made)

    @staticmethod
    def backward(ctx, *grads):
        tensors = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(x.new_empty(x.shape) if need else None for x, need in tensors)


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
          initial_state=None, return_last_state=False):  # fmt: skip
    state = (u.shape[0], u.shape[2], B.shape[2])
    inputs = _given(u, delta, A, B, C, D, z, delta_bias, initial_state)
    y, last = _Kernel.apply((u.shape, state), (u.dtype, torch.float32), *inputs)
    return (y, last) if return_last_state else y


def _conv(x, weight, bias=None, initial_state=None, activation=None):
    return _Kernel.apply((x.shape,), (x.dtype,), *_given(x, weight, bias, initial_state))[0]


def _attention(q, k, v, mem_k=None, mem_v=None, mem_valid=None, *, window, chunk, key_valid=None):
    inputs = _given(q, k, v, mem_k, mem_v, mem_valid, key_valid)
    return _Kernel.apply((q.shape,), (q.dtype,), *inputs)[0]


def _innovation(y, taps=4, weights=None, past=None):
    return _Kernel.apply((y.shape[:2],), (torch.float32,), *_given(y, past))[0]


def _rms_norm(x, normalized_shape, weight=None, eps=None):
    return _Kernel.apply((x.shape,), (x.dtype,), *_given(x, weight))[0]  # one kernel on CUDA


def _top_k(scores, k, chunk):
    shape = (scores.shape[0], -(-scores.shape[1] // chunk), k)
    made = (scores.new_empty(shape, dtype=d) for d in (torch.long, torch.bool))
    return tuple(made)


@contextmanager
def as_kernels() -> Iterator[None]:
    """The layers' operations replaced by allocations of what they return."""
    with (
        patch.object(mamba, "selective_scan", _scan),
        patch.object(mamba, "scalar_scan", _scan),
        patch.object(mamba, "causal_conv1d", _conv),
        patch.object(bmojo, "causal_conv1d", _conv),
        patch.object(bmojo, "memory_attention", _attention),
        patch.object(attention, "memory_attention", _attention),
        patch.object(eidetic, "running_top_k", _top_k),
        patch.object(torch.nn.functional, "rms_norm", _rms_norm),
        patch.object(selection, "squared_prediction_error", _innovation),
    ):
        yield


# -- one block ------------------------------------------------------------------------------------


def block(kind: str, preset: str = "370m", **changes: Any) -> nn.ModuleList:
    """The sublayers of one block of that kind, in bfloat16 on the meta device."""
    config = BMojoConfig.preset(preset, kind, num_layers=1, vocab_size=8, **changes)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return BMojoForCausalLM(config).model.layers
    finally:
        torch.set_default_dtype(torch.float32)


def count(kind: str, route: str, *, tokens: tuple[int, int] = (8, 2048), **changes: Any) -> dict:
    """Launches and bytes of one block: ``route`` is "forward" (no cache), "training" or "step"."""
    layers = block(kind, **changes)
    width = next(layers.parameters()).shape[-1]
    b, l = tokens
    training = route == "training"
    x = torch.empty(b, l, width, device="meta", dtype=torch.bfloat16, requires_grad=training)
    with as_kernels(), torch.set_grad_enabled(training):
        if route == "step":
            return _summary(_step(layers, x))
        with Dispatched() as seen:
            h = x
            for layer in layers:
                h, _ = layer(h, None, None, None, False, None)
            if training:
                h.backward(torch.empty_like(h))
    return _summary(seen)


def _step(layers: nn.ModuleList, x: Tensor) -> Dispatched:
    states, h = [], x
    for layer in layers:
        h, state = layer(h, None, None, None, True, None)
        states.append(state)
    start = torch.empty(x.shape[0], dtype=torch.long, device="meta")
    with Dispatched() as seen:
        h = x[:, :1]
        for layer, state in zip(layers, states, strict=True):
            h, _ = layer(h, state, start, None, True, None)
    return seen


def _summary(seen: Dispatched) -> dict[str, Any]:
    return {
        "launches": sum(seen.launches.values()),
        "products": sum(seen.launches[name] for name in PRODUCTS),
        "mib": round(seen.moved / 2**20, 1),
        "by_name": dict(sorted(seen.launches.items(), key=lambda item: (-item[1], item[0]))),
    }


def main() -> None:
    """Count every kind and route; add the counts to the record under a label."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", required=True, help="what this version is called in the record")
    parser.add_argument("--out", default="results/dispatch.json")
    arguments = parser.parse_args()
    path = Path(arguments.out)
    record = json.loads(path.read_text()) if path.exists() else {"preset": "370m", "versions": []}
    found = {
        route: {kind: count(kind, route) for kind in ("hybrid", "bmojo_f", "bmojo")}
        for route in ("forward", "training", "step")
    }
    kept = [v for v in record["versions"] if v["label"] != arguments.label]
    record["versions"] = [*kept, {"label": arguments.label, "torch": torch.__version__, **found}]
    write_json(path, record)
    for route, kinds in found.items():
        for kind, seen in kinds.items():
            print(f"{route:9s} {kind:8s}", {k: v for k, v in seen.items() if k != "by_name"})


if __name__ == "__main__":
    main()
