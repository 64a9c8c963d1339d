"""The signature check: it sees wrong calls, spares compiled modules, yields to `pytest.raises`."""

import importlib
import sys
from pathlib import Path

import pytest
import runtime_types
from jaxtyping import TypeCheckError

CHECKED = """
from jaxtyping import Float
from torch import Tensor

def diagonal(a: Float[Tensor, "n n"]) -> Float[Tensor, "n"]:
    if a.shape[0] != a.shape[1]:
        raise ValueError("a must be square")
    return a.diagonal()

def half(x: float) -> float:
    return x / 2

def lying(a: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    return a[1:]
"""
COMPILED = """
import numba

@numba.njit
def twice(x: str) -> str:
    return x + x
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch):
    """A checked module and a compiled one, in a package named like one of ours."""
    import realization

    (tmp_path / "_checked.py").write_text(CHECKED)
    (tmp_path / "_compiled.py").write_text(COMPILED)
    monkeypatch.setattr(realization, "__path__", [*realization.__path__, str(tmp_path)])
    names = ("realization._checked", "realization._compiled")
    yield [importlib.import_module(name) for name in names]
    for name in names:
        del sys.modules[name]


def test_wrong_shapes_and_types_are_seen(modules) -> None:
    import torch

    checked, _ = modules
    assert checked.diagonal(torch.eye(2)).shape == (2,)
    assert checked.half(3) == 1.5  # an int is a float
    for call in (
        lambda: checked.diagonal(torch.ones(2, 3)),
        lambda: checked.half("3"),
        lambda: checked.lying(torch.ones(3)),
    ):
        try:
            call()
        except TypeCheckError:
            continue
        raise AssertionError("a wrong call went through")


def test_inside_raises_the_library_speaks(modules) -> None:
    import torch

    checked, _ = modules
    with pytest.raises(ValueError, match="square"):
        checked.diagonal(torch.ones(2, 3))


def test_compiled_modules_are_left_alone(modules) -> None:
    _, compiled = modules
    assert compiled.twice(2.0) == 4.0


def test_late_switching_is_refused(modules) -> None:
    with pytest.raises(RuntimeError, match="realization"):
        runtime_types.switch_on()
