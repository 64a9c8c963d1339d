"""Pages of the interface: one for each public module, made from its docstrings."""

import importlib
import inspect
import pkgutil
from pathlib import Path

from plain_docstrings import as_restructured_text, literal_signs
from sphinx.application import Sphinx

# Compiled for one device; what they compute is documented at the operation they belong to.
DEVICE_MODULES = {"cpu", "gpu", "cpu_kernels", "gpu_kernels", "kernels"}


def public_modules(package: str) -> list[str]:
    """Names of a package and of every public module below it."""
    root = importlib.import_module(package)
    found = [package]
    for info in pkgutil.walk_packages(root.__path__, prefix=package + "."):
        parts = info.name.split(".")
        if not any(part.startswith("_") for part in parts) and not DEVICE_MODULES & set(parts):
            found.append(info.name)
    return found


def write(folder: Path, packages: tuple[str, ...]) -> None:
    """Write a page for each public module; leave alone what did not change, for Sphinx's sake."""
    folder.mkdir(exist_ok=True)
    names = [name for package in packages for name in public_modules(package)]
    pages = {f"{name}.rst": _page(name, names) for name in names}
    for old in folder.glob("*.rst"):
        if old.name not in pages:
            old.unlink()
    for file, text in pages.items():
        path = folder / file
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def own_names(module: object) -> list[str]:
    """Public functions and classes on this page: defined here, or taken from a private module."""
    name = module.__name__
    exported = getattr(module, "__all__", None)
    candidates = vars(module) if exported is None else exported
    return [
        n
        for n in candidates
        if not n.startswith("_")
        and (inspect.isclass(getattr(module, n)) or callable(getattr(module, n)))
        and (_home(module, n) == name or (exported and "._" in _home(module, n)))
    ]


def _home(module: object, name: str) -> str:
    return getattr(getattr(module, name), "__module__", None) or ""


def _page(name: str, names: list[str]) -> str:
    module = importlib.import_module(name)
    own = own_names(module)
    taken = sorted(set(getattr(module, "__all__", [])) - set(own), key=str.lower)
    entries = [_entry(module, n) for n in taken if _home(module, n) in names]
    below = [other for other in names if other.rpartition(".")[0] == name]
    title = f"``{name}``"
    lines = [title, "=" * len(title), "", f".. automodule:: {name}"]
    lines += [f"   :members: {', '.join(own)}", "   :show-inheritance:"] if own else []
    lines += ["", ".. rubric:: Public names", "", *entries] if entries else []
    if below:
        lines += ["", ".. toctree::", "   :caption: Modules", "   :maxdepth: 1", ""]
        lines += [f"   {other}" for other in below]
    return "\n".join(lines) + "\n"


def _entry(module: object, name: str) -> str:
    """A line of an index: the name, linked to the page it is described on, and what it is."""
    value = getattr(module, name)
    summary = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    target = f"{_home(module, name)}.{getattr(value, '__qualname__', name)}"
    return f"* :py:obj:`{name} <{target}>`: {literal_signs(summary)}"


def _translate(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)


def setup(app: Sphinx) -> dict:
    """Translate docstrings before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", _translate, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
