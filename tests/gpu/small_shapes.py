"""Every kernel once on small, odd shapes: what compute-sanitizer is given to watch.

    compute-sanitizer --tool memcheck python tests/gpu/small_shapes.py

Widths that no vector divides, lengths that no tile divides, views, carried states, several cuts of
the scan; forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bmojo_core.ops import (
    causal_conv1d,
    innovation,
    memory_attention,
    running_top_k,
    scalar_scan,
    selective_scan,
)
from bmojo_core.ops.memory_gather import add_taken
from bmojo_core.ops.selective_scan import gpu as scan_gpu


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


def backward(outputs: tuple[Tensor, ...], inputs: list[Tensor | None]) -> None:
    loss = sum(y.float().sum() for y in outputs)
    torch.autograd.grad(loss, [x for x in inputs if x is not None])


def scans() -> None:
    chosen = scan_gpu.tiling
    for dtype, d in ((torch.float32, 7), (torch.bfloat16, 72)):
        for n, states, segments in ((16, 4, 3), (16, 2, 2), (3, 4, 1), (40, 4, 2)):
            cut = scan_gpu.Tiling(states, scan_gpu.lanes_for(n, states), segments)
            scan_gpu.tiling = lambda *_, cut=cut, **__: cut
            scan(2, 200, d, n, dtype)
    scan_gpu.tiling = chosen


def scan(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> None:
    u, delta, z = (normal(b, l, d, dtype=dtype) for _ in range(3))
    B, C = normal(b, l, 2 * n, dtype=dtype).split((n, n), dim=-1)
    A = -normal(d, n).abs()
    inputs = [u, delta, A, B, C, normal(d), z, normal(d)]
    state = normal(b, d, n)
    outputs = selective_scan(*inputs, True, state, return_last_state=True, backend="gpu")
    backward(outputs, [*inputs, state])


def scalar_scans() -> None:
    cases = ((torch.float32, 70, 3, 7, 5), (torch.bfloat16, 200, 9, 24, 40))
    cases += ((torch.float16, 65, 2, 64, 128),)
    for dtype, l, h, p, n in cases:
        u, z = (normal(2, l, h * p, dtype=dtype) for _ in range(2))
        B, C = normal(2, l, 2 * n, dtype=dtype).split((n, n), dim=-1)
        inputs = [u, normal(2, l, h, dtype=dtype), -normal(h).abs(), B, C, normal(h * p), z]
        inputs += [normal(h)]
        state = normal(2, h * p, n)
        outputs = scalar_scan(*inputs, True, state, return_last_state=True, backend="gpu")
        backward(outputs, [*inputs, state])


def convolutions() -> None:
    for dtype, d in ((torch.float32, 13), (torch.bfloat16, 72)):
        inputs = [normal(2, 45, d, dtype=dtype), normal(d, 4), normal(d)]
        state = normal(2, 3, d, dtype=dtype)
        y = causal_conv1d(*inputs, initial_state=state, activation="silu", backend="gpu")
        backward((y,), [*inputs, state])


def innovations() -> None:
    for dtype, d in ((torch.float32, 13), (torch.bfloat16, 1096)):
        scores = innovation(normal(2, 77, d, dtype=dtype).detach(), backend="gpu")
        running_top_k(scores, 9, 10, backend="gpu")


def attentions() -> None:
    shapes = ((torch.float32, 100, 13, 24, 40, 30, 5), (torch.bfloat16, 65, 0, 64, 100, 32, 70))
    for dtype, l, r, p, window, chunk, m in shapes:
        q, k, v = (normal(2, n, h, p, dtype=dtype) for n, h in ((l, 4), (l + r, 2), (l + r, 2)))
        memory = [normal(2, -(-l // chunk), m, 2, p, dtype=dtype) for _ in "kv"]
        valid = (torch.rand(1, l + r, device="cuda") > 0.3).expand(2, -1)
        known = (torch.rand(1, *memory[0].shape[1:3], device="cuda") > 0.3).expand(2, -1, -1)
        options = dict(window=window, chunk=chunk, backend="gpu")
        options |= dict(key_valid=valid, mem_valid=known)
        backward((memory_attention(q, k, v, *memory, **options),), [q, k, v, *memory])


def gathers() -> None:
    shapes = ((torch.float32, 50, 5, 7, 13), (torch.bfloat16, 33, 40, 4, 96))
    for dtype, l, m, chunk, width in shapes:
        index, valid = running_top_k(normal(2, l).detach(), m, chunk)
        g = tuple(normal(2, l, width, dtype=dtype).detach() for _ in "kv")
        wider = normal(2, index.shape[1], m + 3, width, dtype=dtype).detach()
        add_taken(g, (wider[:, :, 3:], wider[:, :, :m]), index, valid)


EVERY: tuple[Callable[[], None], ...] = (
    scans, scalar_scans, convolutions, innovations, attentions, gathers,
)  # fmt: skip

if __name__ == "__main__":
    for group in EVERY:
        group()
        torch.cuda.synchronize()
        print(f"{group.__name__}: done", flush=True)
