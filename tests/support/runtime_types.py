"""Check every call of the two packages against its signature: type hints and tensor shapes.

jaxtyping's import hook wraps each function of a module as it is imported. Two exceptions:

- a module that imports numba or triton, or registers an operator with torch, is left alone, for
  those compilers read the bare function;
- inside `with pytest.raises(...)` the check is silent, for there the library
  itself has to refuse the input.
"""

import re
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

PACKAGES = ("realization", "bmojo_core")

_COMPILER = re.compile(
    r"^\s*(?:import|from)\s+(?:numba|triton)\b|^@torch\.library\.custom_op", re.MULTILINE
)

# PEP 484: where a float is asked for, an int will do.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


class _CompiledModules:
    """A finder that imports modules with compiled functions as they are."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or not spec.has_location:
            return None
        return spec if _COMPILER.search(Path(spec.origin).read_text()) else None


class _Refusal:
    """`pytest.raises`, with the signature check silent inside the block."""

    def __init__(self, expected) -> None:
        self._expected = expected

    def __enter__(self):
        self._before = jaxtyping.config.jaxtyping_disable
        jaxtyping.config.update("jaxtyping_disable", True)
        return self._expected.__enter__()

    def __exit__(self, *exception) -> bool:
        jaxtyping.config.update("jaxtyping_disable", self._before)
        return self._expected.__exit__(*exception)


def switch_on() -> None:
    """Install the check. Call it once, before the packages are imported."""
    early = sorted(set(PACKAGES) & set(sys.modules))
    if early:
        raise RuntimeError(f"imported before the signature check was switched on: {early}")
    jaxtyping.install_import_hook(PACKAGES, "runtime_types.check")
    sys.meta_path.insert(0, _CompiledModules())

    raises = pytest.raises

    def raises_unchecked(expected_exception, *args, **kwargs):
        return _Refusal(raises(expected_exception, *args, **kwargs))

    pytest.raises = raises_unchecked
