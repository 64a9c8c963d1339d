"""The scalar scan's kernels under triton's interpreter, on the CPU; run as a script.

A process of its own: triton reads the environment when it is first imported. bfloat16 is left to a
GPU, for the interpreter multiplies its bits instead of its values.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from triton.runtime import interpreter

from bmojo_core.ops.scalar_scan import gpu, scalar_scan

CASES = (  # b, l, heads, p, n, dtype, with optional arguments
    (2, 70, 3, 8, 5, torch.float32, True),
    (2, 1, 1, 1, 1, torch.float32, True),
    (1, 130, 4, 16, 16, torch.float32, False),
    (1, 65, 2, 20, 40, torch.float16, True),
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}


def numbers_of_tensors_as_numpy_2_4_wants_them() -> None:
    """A kernel's `range` asks its bounds for integers; arrays of one element are none any more."""
    scope = interpreter._LangPatchScope
    set_attr = scope.set_attr

    def patched(self, target: object, name: str, value: object) -> None:
        if name == "__index__":
            value = lambda tensor: int(tensor.handle.data.item())  # noqa: E731
        set_attr(self, target, name, value)

    scope.set_attr = patched


def draw(b: int, l: int, h: int, p: int, n: int, dtype: torch.dtype, full: bool) -> dict:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    d = h * p
    narrow = dict(u=normal(b, l, d), delta=normal(b, l, h), B=normal(b, l, n), C=normal(b, l, n))
    narrow |= dict(z=normal(b, l, d)) if full else {}
    inputs = {name: x.to(dtype) for name, x in narrow.items()} | dict(A=-torch.exp(normal(h) / 2))
    if full:
        inputs |= dict(D=normal(d), delta_bias=normal(h) - 2, initial_state=normal(b, d, n))
    return inputs


def forgetful(seed: int) -> dict[str, Tensor]:
    """A step that forgets all, then one that forgets next to nothing, and so on.

    What passes a long step is nothing, and the gradient of A weighs it by that length.
    """
    inputs = draw(1, 100, 2, 16, 16, torch.float32, True)
    g = torch.Generator().manual_seed(seed)
    inputs["delta"] = 20 * torch.randn(1, 100, 2, generator=g).abs()
    inputs["delta"][:, 1::2] = -7.0  # softplus: 1e-3
    del inputs["delta_bias"]
    return inputs


def results(scan, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and all gradients of a random projection of them."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    outputs = scan(**leaves)
    g = torch.Generator().manual_seed(1)
    loss = sum((y.double() * torch.randn(y.shape, generator=g).double()).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]


def kernels(**given: Tensor) -> tuple[Tensor, Tensor]:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    return gpu.scalar_scan_gpu(*map(given.get, names), True, given.get("initial_state"))


def reference(**given: Tensor) -> tuple[Tensor, Tensor]:
    return scalar_scan(**given, delta_softplus=True, return_last_state=True, backend="reference")


def beyond_half() -> float:
    """Error of float16 outputs whose states pass what float16 can hold."""
    l, half = 640, torch.float16
    u, B, C = (torch.full((1, l, w), v, dtype=half) for w, v in ((2, 16), (16, 16), (16, 1e-4)))
    inputs = dict(u=u, delta=torch.ones(1, l, 1, dtype=half), A=torch.tensor([-1e-4]), B=B, C=C)
    y, state = kernels(**inputs)
    want, _ = reference(**{name: x.double() for name, x in inputs.items()})
    assert state.max() > 1e5
    return ((y.double() - want).norm() / want.norm()).item()


if __name__ == "__main__":
    numbers_of_tensors_as_numpy_2_4_wants_them()
    gpu._require_cuda = lambda u: None
    gpu.ENOUGH = 4  # so that a program takes more than one head
    problems = [(case, draw(*case)) for case in CASES]
    problems += [("all forgotten at every other step", forgetful(seed)) for seed in range(3)]
    for case, inputs in problems:
        dtype = inputs["u"].dtype
        exact = results(reference, {name: x.double() for name, x in inputs.items()})
        for i, (got, want) in enumerate(zip(results(kernels, inputs), exact, strict=True)):
            error = ((got.double() - want).norm() / want.norm()).item()
            assert error <= TOLERANCE[dtype], f"{case}: result {i} is off by {error:.1e}"
    assert beyond_half() <= TOLERANCE[torch.float16]
    print("kernels equal the reference")
