"""Time and peak memory of the GPU operations beside their floors and their peers.

    python benchmarks/ops_gpu.py [--only scan,scalar_scan,...] [--output FILE.json]

Every case is a median of device times between events, with the work queued ahead so that the time
of the Python side stays out; both sides of a ratio run in this process on the same tensors. Floors:

- bytes: every input read once and every output written once, at the copy rate measured here;
- exponentials: one for each (channel, state, step), at 16 a clock and multiprocessor.

The scalar scan (one decay a head of 64 channels, N = 64 and 128) stands beside the selective scan
(N = 16) of the same shape. A case that fails leaves its error in the record, and the rest go on.

mamba-ssm is compared with where it is installed; torch's flash attention (two calls merged by
log-sum-exp) and FlexAttention (compiled) always.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bmojo_core.ops import (
    causal_conv1d,
    innovation,
    memory_attention,
    running_top_k,
    scalar_scan,
    selective_scan,
)
from bmojo_core.training import provenance, write_json

SCANS = ((8, 2048, 4096), (1, 16384, 4096), (8, 2048, 1536))
ATTENTIONS = (  # length, key heads, memory tokens; 16384 tokens, 16 heads of 128, window 512
    (16384, 16, 0),
    (16384, 16, 65),
    (16384, 16, 128),
    (16384, 16, 576),
    (16384, 4, 128),
    (131072, 16, 128),
)
LARGEST_CLOCK_KHZ = 1_980_000  # H100 and H200
SCALAR_STATES, SCALAR_WIDTH = (64, 128), 64
STATES, TAPS, HEADS, WIDTH, WINDOW, CHUNK = 16, 4, 16, 128, 512, 512


def time_of(call: Callable[[], object], repeats: int = 20) -> float:
    """Median device time of a call in milliseconds."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(50_000_000)  # the queue fills while the device waits
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events))


def peak_of(call: Callable[[], object]) -> float:
    """MiB that a call takes at its peak, over what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_rate() -> float:
    """Bytes a millisecond, read and written, of a large device copy."""
    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_of(lambda: target.copy_(source))


def exponential_rate() -> float:
    """Exponentials a millisecond: 16 a clock and multiprocessor at the largest clock."""
    device = torch.cuda.get_device_properties(0)
    return 16.0 * device.multi_processor_count * LARGEST_CLOCK_KHZ


def normal(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16().requires_grad_(grad)


def with_gradient(forward: Callable[[], Tensor], inputs: list[Tensor], weight: Tensor) -> Callable:
    return lambda: torch.autograd.grad(forward(), inputs, weight)


def without_gradient(forward: Callable[[], Tensor]) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            forward()

    return call


def scan_case(shape: tuple[int, int, int], copies: float, exponentials: float) -> dict:
    b, l, d = shape
    u, delta, z = (normal(b, l, d) for _ in range(3))
    B, C = (normal(b, l, STATES) for _ in range(2))
    A = (-torch.exp(0.5 * torch.randn(d, STATES, device="cuda"))).requires_grad_()
    D = torch.randn(d, device="cuda", requires_grad=True)
    bias = (torch.randn(d, device="cuda") - 4).requires_grad_()
    inputs, weight = [u, delta, A, B, C, D, z, bias], torch.randn_like(u)

    def ours() -> Tensor:
        return selective_scan(u, delta, A, B, C, D, z, bias, True, backend="gpu")

    row, count = u.numel() * u.element_size(), u.numel() * STATES
    result = dict(
        shape=list(shape),
        forward_ms=time_of(without_gradient(ours)),
        forward_backward_ms=time_of(with_gradient(ours, inputs, weight)),
        peak_mib=peak_of(with_gradient(ours, inputs, weight)),
        floors_ms=dict(
            forward_bytes=4 * row / copies,
            forward_backward_bytes=11 * row / copies,
            one_pass_of_exponentials=count / exponentials,
        ),
    )
    if importlib.util.find_spec("mamba_ssm") is not None:
        result["mamba_ssm"] = mamba_case(inputs, weight, ours)
    return result


def mamba_case(inputs: list[Tensor], weight: Tensor, ours: Callable[[], Tensor]) -> dict:
    """mamba-ssm's own function on the same numbers, in the layout (b, d, l) it was made for."""
    import mamba_ssm
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A, B, C, D, z, bias = (x.detach() for x in inputs)
    rows = [x.transpose(1, 2).contiguous() for x in (u, delta, B, C, z)]
    u, delta, B, C, z = (x.requires_grad_() for x in rows)
    A, D, bias = (x.clone().requires_grad_() for x in (A, D, bias))
    weight = weight.transpose(1, 2).contiguous()

    def theirs() -> Tensor:
        return selective_scan_fn(u, delta, A, B, C, D, z, bias, True)

    with torch.no_grad():
        y = theirs().transpose(1, 2).float()
        apart = ((ours().float() - y).norm() / y.norm()).item()
    leaves = [u, delta, A, B, C, D, z, bias]
    return dict(
        version=mamba_ssm.__version__,
        forward_ms=time_of(without_gradient(theirs)),
        forward_backward_ms=time_of(with_gradient(theirs, leaves, weight)),
        peak_mib=peak_of(with_gradient(theirs, leaves, weight)),
        relative_difference=apart,
    )


def scalar_scan_case(shape: tuple[int, int, int], n: int, copies: float) -> dict:
    """One decay a head, beside our selective scan of the same shape and mamba-ssm's own kernels."""
    b, l, d = shape
    h = d // SCALAR_WIDTH
    u, z, B, C = normal(b, l, d), normal(b, l, d), normal(b, l, n), normal(b, l, n)
    delta, D = normal(b, l, h), torch.randn(d, device="cuda", requires_grad=True)
    A = (-torch.exp(0.5 * torch.randn(h, device="cuda"))).requires_grad_()
    bias = (torch.randn(h, device="cuda") - 4).requires_grad_()
    inputs, weight = [u, delta, A, B, C, D, z, bias], torch.randn_like(u)

    def ours() -> Tensor:
        return scalar_scan(u, delta, A, B, C, D, z, bias, True, backend="gpu")

    row = u.numel() * u.element_size()
    result = dict(
        shape=list(shape),
        states=n,
        head_width=SCALAR_WIDTH,
        **timed(ours, inputs, weight),
        floors_ms=dict(forward_bytes=3 * row / copies, forward_backward_bytes=8 * row / copies),
        selective_scan=guarded(lambda: selective_times(u.detach(), z.detach(), weight)),
    )
    if importlib.util.find_spec("mamba_ssm") is not None:
        result["mamba_ssm"] = guarded(lambda: mamba_chunk_case(inputs, weight, ours))
    return result


def timed(call: Callable[[], Tensor], inputs: list[Tensor], weight: Tensor) -> dict[str, float]:
    """Forward, forward and backward, and the peak memory of both."""
    return dict(
        forward_ms=time_of(without_gradient(call)),
        forward_backward_ms=time_of(with_gradient(call, inputs, weight)),
        peak_mib=peak_of(with_gradient(call, inputs, weight)),
    )


def selective_times(u: Tensor, z: Tensor, weight: Tensor) -> dict[str, float]:
    """Our selective scan, N = 16, on the same input and gate."""
    b, l, d = u.shape
    u, z, delta = u.clone().requires_grad_(), z.clone().requires_grad_(), normal(b, l, d)
    B, C = (normal(b, l, STATES) for _ in range(2))
    A = (-torch.exp(0.5 * torch.randn(d, STATES, device="cuda"))).requires_grad_()
    D = torch.randn(d, device="cuda", requires_grad=True)
    bias = (torch.randn(d, device="cuda") - 4).requires_grad_()

    def call() -> Tensor:
        return selective_scan(u, delta, A, B, C, D, z, bias, True, backend="gpu")

    return dict(states=STATES) | timed(call, [u, delta, A, B, C, D, z, bias], weight)


def mamba_chunk_case(inputs: list[Tensor], weight: Tensor, ours: Callable[[], Tensor]) -> dict:
    """mamba-ssm's state-space duality on the same numbers, chunks of 256 as in its own layer."""
    import mamba_ssm
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    u, delta, A, B, C, D, z, bias = (x.detach().clone() for x in inputs)
    leaves = [x.requires_grad_() for x in (u, delta, A, B, C, D, z, bias)]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, SCALAR_WIDTH))

    def theirs() -> Tensor:
        y = mamba_chunk_scan_combined(
            heads(u), delta, A, B.unsqueeze(2), C.unsqueeze(2), 256, D=heads(D), z=heads(z),
            dt_bias=bias, dt_softplus=True,
        )  # fmt: skip
        return y.flatten(2)

    with torch.no_grad():
        y = theirs().float()
        apart = ((ours().float() - y).norm() / y.norm()).item()
    times = timed(theirs, leaves, weight)
    return dict(version=mamba_ssm.__version__, **times, relative_difference=apart)


def guarded(case: Callable[[], dict]) -> dict:
    """A case's result or, where it fails, what went wrong: the others are not lost with it."""
    try:
        return case()
    except Exception as error:
        torch.cuda.empty_cache()
        return dict(error=f"{type(error).__name__}: {error}"[:2000])


def conv_case(shape: tuple[int, int, int], copies: float) -> dict:
    b, l, d = shape
    x, weight = normal(b, l, d), torch.randn(b, l, d, device="cuda").bfloat16()
    taps = torch.randn(d, 4, device="cuda", requires_grad=True)
    bias = torch.randn(d, device="cuda", requires_grad=True)

    def ours() -> Tensor:
        return causal_conv1d(x, taps, bias, activation="silu", backend="gpu")

    forward, row = time_of(without_gradient(ours)), x.numel() * x.element_size()
    both = time_of(with_gradient(ours, [x, taps, bias], weight))
    floors = dict(forward=2 * row / copies, forward_backward=5 * row / copies)
    return dict(
        shape=list(shape),
        forward_ms=forward,
        forward_backward_ms=both,
        floors_ms=floors,
        forward_over_floor=forward / floors["forward"],
        forward_backward_over_floor=both / floors["forward_backward"],
        causal_conv1d=guarded(lambda: their_conv(x, taps, bias, weight)),
    )


def their_conv(x: Tensor, taps: Tensor, bias: Tensor, weight: Tensor) -> dict:
    """The package causal-conv1d on the same tensors, as they lie (its channel-last kernel)."""
    if importlib.util.find_spec("causal_conv1d") is None:
        return dict(skipped="causal-conv1d is not installed")
    from causal_conv1d import __version__, causal_conv1d_fn

    def theirs() -> Tensor:
        y = causal_conv1d_fn(x.transpose(1, 2), taps, bias, activation="silu")
        return y.transpose(1, 2)

    ours = causal_conv1d(x, taps, bias, activation="silu", backend="gpu")
    return dict(
        version=__version__,
        forward_ms=time_of(without_gradient(theirs)),
        forward_backward_ms=time_of(with_gradient(theirs, [x, taps, bias], weight)),
        largest_difference=(theirs() - ours).detach().float().abs().max().item(),
    )


def innovation_case(l: int, d: int, k: int, copies: float) -> dict:
    y = normal(1, l, d, grad=False)
    scores = innovation(y, TAPS, backend="gpu")
    row = y.numel() * y.element_size()
    return dict(
        length=l,
        channels=d,
        eidetic_tokens=k,
        chunk=CHUNK,
        innovation_ms=time_of(lambda: innovation(y, TAPS, backend="gpu")),
        running_top_k_ms=time_of(lambda: running_top_k(scores, k, CHUNK, backend="gpu")),
        floor_ms=row / copies,
    )


def attention_case(l: int, g: int, m: int) -> dict:
    b, c = max(1, 16384 // l), l // CHUNK
    q, k, v = normal(b, l, HEADS, WIDTH), normal(b, l, g, WIDTH), normal(b, l, g, WIDTH)
    memory = [normal(b, c, m, g, WIDTH) for _ in "kv"] if m else [None, None]
    weight = torch.randn_like(q)
    inputs = [x for x in (q, k, v, *memory) if x is not None]
    options = dict(window=WINDOW, chunk=CHUNK if m else None, backend="gpu")

    def ours() -> Tensor:
        return memory_attention(q, k, v, *memory, **options)

    operations = 4 * b * l * HEADS * WIDTH * (WINDOW + m)
    forward = time_of(without_gradient(ours))
    both = time_of(with_gradient(ours, inputs, weight))
    result = dict(
        length=l,
        batch=b,
        key_heads=g,
        memory_tokens=m,
        forward_ms=forward,
        forward_backward_ms=both,
        forward_tflops=operations / forward / 1e9,
        merged_flash_forward_ms=time_of(lambda: merged_flash(q, k, v, *memory)),
    )
    if l <= 16384:
        result |= flex_case(q, k, v, m, weight)
    return result


def merged_flash(
    q: Tensor, k: Tensor, v: Tensor, mem_k: Tensor | None, mem_v: Tensor | None
) -> Tensor:
    """The two-call route: window and memory apart, merged by their log-sum-exps."""
    flash = torch.ops.aten._flash_attention_forward
    q, k, v = q.detach(), k.detach(), v.detach()
    b, l, h, p = q.shape
    near, near_sum = flash(
        q, k, v, None, None, l, l, 0.0, True, False, window_size_left=WINDOW - 1,
        window_size_right=0,
    )[:2]  # fmt: skip
    if mem_k is None:
        return near
    blocks = q.view(b * (l // CHUNK), CHUNK, h, p)
    keys, values = (x.detach().flatten(0, 1) for x in (mem_k, mem_v))
    far, far_sum = flash(
        blocks, keys, values, None, None, CHUNK, keys.shape[1], 0.0, False, False
    )[:2]  # fmt: skip
    far = far.reshape(b, l, h, p)
    far_sum = far_sum.view(b, l // CHUNK, h, CHUNK).transpose(1, 2).reshape(b, h, l)
    share = torch.sigmoid(near_sum - far_sum).transpose(1, 2).unsqueeze(-1).to(q.dtype)
    return far + share * (near - far)


def flex_case(q: Tensor, k: Tensor, v: Tensor, m: int, weight: Tensor) -> dict:
    """FlexAttention, compiled, with a sliding window of as many visible keys."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, l = WINDOW + m, q.shape[1]

    def near(b, h, i, j):
        return (j <= i) & (j > i - window)

    mask = create_block_mask(near, None, None, l, l, device="cuda")
    heads = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(flex_attention)

    def call() -> Tensor:
        return compiled(*heads, block_mask=mask, enable_gqa=q.shape[2] != k.shape[2])

    gradient = weight.transpose(1, 2).contiguous()
    return dict(
        flex_forward_ms=time_of(without_gradient(call)),
        flex_forward_backward_ms=time_of(with_gradient(call, heads, gradient)),
    )


def measure(only: set[str], save: Callable[[dict], None]) -> dict:
    """All cases asked for; what there is so far is saved after each."""
    torch.manual_seed(0)
    copies, exponentials = copy_rate(), exponential_rate()
    cases: dict[str, list[Callable[[], dict]]] = {
        "scan": [lambda s=s: scan_case(s, copies, exponentials) for s in SCANS],
        "conv": [lambda s=s: conv_case(s, copies) for s in SCANS],
        "innovation": [lambda k=k: innovation_case(16384, 2048, k, copies) for k in (64, 512)],
        "attention": [lambda a=a: attention_case(*a) for a in ATTENTIONS],
        # last: its first case once took a minute and a half, compilation and tuning included
        "scalar_scan": [
            lambda s=s, n=n: scalar_scan_case(s, n, copies) for s in SCANS for n in SCALAR_STATES
        ],
    }
    results = dict(
        **provenance(),
        cuda=torch.version.cuda,
        dtype="bfloat16",
        method="medians of 20 device times between events, launches queued ahead",
        copy_tb_per_s=copies / 1e9,
        exponentials_per_s=exponentials * 1e3,
    )
    for name in cases:
        if name in only:
            results[name] = []
            for case in tqdm(cases[name], desc=name):
                results[name].append(guarded(case))
                save(results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="scan,scalar_scan,conv,innovation,attention")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_ops_gpu.json"))
    arguments = parser.parse_args()
    results = measure(
        set(arguments.only.split(",")), lambda record: write_json(arguments.output, record)
    )
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
