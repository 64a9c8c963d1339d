"""Tests of the GPU kernels: run where there is a CUDA device, skipped with the reason elsewhere."""

from pathlib import Path

import pytest
import torch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture
def draw():
    """Fresh numbers from a generator of the test's own: draw(shape..., dtype=, seed=)."""
    generator = torch.Generator(device="cuda")
    generator.seed()

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    normal.seed = generator.initial_seed()
    return normal


@pytest.fixture
def compare():
    """Outputs and every gradient of ``fast`` against ``exact`` in float64, by relative error."""
    return check_against_float64


@pytest.fixture
def poisoned():
    """Fill the allocator's free blocks with NaN, so that an unwritten output shows."""

    def poison(gibibytes: float = 0.5) -> None:
        blocks = [
            torch.full((size,), float("nan"), device="cuda")
            for size in (2**7, 2**10, 2**14, 2**18, 2**22, int(gibibytes * 2**28))
            for _ in range(4 if size < 2**22 else 1)
        ]
        del blocks

    return poison


def check_against_float64(fast, exact, inputs: dict, dtype: torch.dtype) -> dict[str, float]:
    """Errors ||fast - exact|| / ||exact|| of all outputs and gradients, each under the tolerance.

    The loss is a random projection of every output, drawn once for both sides.
    """
    mine = {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}
    true = {
        n: None if x is None else x.detach().double().clone().requires_grad_()
        for n, x in inputs.items()
    }
    got, want = fast(**mine), exact(**true)
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    projections = [torch.randn_like(y) for y in got]
    leaves = [n for n, x in inputs.items() if x is not None]
    found = torch.autograd.grad(
        sum((y.double() * w.double()).sum() for y, w in zip(got, projections)),
        [mine[n] for n in leaves],
    )
    expected = torch.autograd.grad(
        sum((y * w.double()).sum() for y, w in zip(want, projections)), [true[n] for n in leaves]
    )
    pairs = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(got, want))]
    pairs += [(f"gradient of {n}", a, b) for n, a, b in zip(leaves, found, expected)]
    errors = {}
    for name, a, b in pairs:
        errors[name] = float((a.detach().double() - b.detach()).norm() / b.detach().norm())
    wrong = {name: e for name, e in errors.items() if not e <= TOLERANCE[dtype]}
    assert not wrong, f"relative errors above {TOLERANCE[dtype]}: {wrong}; all: {errors}"
    return errors
