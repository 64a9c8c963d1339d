"""The rules of the house that a machine can see: who imports whom, sizes, docstrings, style."""

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p for name in ("realization", "bmojo_core") for p in (ROOT / name).rglob("*.py"))
SCRIPTS = sorted(p for name in ("tests", "benchmarks") for p in (ROOT / name).rglob("*.py"))

# Who may not import what. A rule holds for a file or for everything below a folder.
LEARNING = {f"bmojo_core.{room}" for room in ("tasks", "training", "evaluation", "experiments")}
MODELS = {f"bmojo_core.{room}" for room in ("modeling", "convert", "inspect", "storage")}
LAYERS = {"bmojo_core.layers", "bmojo_core.config", "bmojo_core.cache"}
FORBIDDEN = {
    "realization": {"torch", "transformers", "bmojo_core", "numba"},
    "bmojo_core": {"notebooks", "tests", "benchmarks", "control", "statsmodels", "mambapy"},
    "bmojo_core/ops": LAYERS | MODELS | LEARNING,
    "bmojo_core/layers": MODELS | LEARNING,
    "bmojo_core/modeling.py": LEARNING,
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports anywhere, relative imports resolved."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found


def _held_by(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_keep_to_themselves(room: str) -> None:
    place = ROOT / room
    files = [place] if place.suffix else sorted(place.rglob("*.py"))
    assert files, f"{room}: nothing there"
    broken = [
        f"{_name(file)} imports {module}"
        for file in files
        for module in sorted(imported_modules(file))
        if any(_held_by(module, forbidden) for forbidden in FORBIDDEN[room])
    ]
    assert not broken, "\n".join(broken)


def test_the_import_reader_sees_every_form(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "a" / "b" / "c.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import x.y\nfrom z import w\nif x:\n    from . import d\n    from ..e import g"
    )
    assert imported_modules(file) == {"x.y", "z", "z.w", "a.b", "a.b.d", "a.e", "a.e.g"}


IMPORT = """
import importlib, json, sys, time
seconds = []
for group in {groups}:
    start = time.process_time()
    for module in group:
        importlib.import_module(module)
    seconds.append(time.process_time() - start)
cuda = getattr(sys.modules.get("torch"), "cuda", None)
print(json.dumps({{
    "seconds": seconds,
    "modules": sorted({{name.partition(".")[0] for name in sys.modules}}),
    "cuda": bool(cuda and cuda.is_initialized()),
}}))
"""


def _import(*groups: list[str]) -> dict:
    """A fresh interpreter imports: processor seconds a group, modules loaded, CUDA started."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COVERAGE_PROCESS_START",)}
    result = subprocess.run(
        [sys.executable, "-c", IMPORT.format(groups=groups)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(result.stdout)


def test_import_is_light() -> None:
    """`import bmojo_core` loads no compiler, no rival and no CUDA, and takes under 3 s warm.

    Processor seconds, for a process that waits is not slow.  Where what the package cannot do
    without (torch, transformers' configurations) takes most of the 3 s alone, its own part must
    stay under a tenth of that; both are taken in one process, for two can differ by a third.
    """
    needed = ["torch", "transformers.configuration_utils", "transformers.models.auto"]
    run = _import(needed, ["bmojo_core"])
    loaded = {"triton", "mamba_ssm", "flash_attn", "causal_conv1d", "numba"} & {*run["modules"]}
    assert not loaded and not run["cuda"], (loaded, run["cuda"])
    theirs, ours = run["seconds"]
    assert theirs + ours < 3 or ours < 0.1 * theirs, (
        f"import bmojo_core takes {theirs + ours:.1f} s of processor time, {ours:.2f} s its own"
    )


def test_realization_knows_nothing_of_torch() -> None:
    run = _import(["realization"])
    assert not {"torch", "transformers", "bmojo_core"} & {*run["modules"]}


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=_name)
def test_no_file_is_too_long(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 500, f"{_name(path)}: {lines} lines, 500 are allowed"


def _public_definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Module, public functions and classes, and the public methods of public classes."""
    tree = _tree(path)
    yield "module", tree
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, kinds[:2]) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member


def _explains_itself(name: str, node: ast.AST) -> bool:
    """Methods that torch names: `forward` does what its class says, a setter what a getter does."""
    if name.rpartition(".")[2] in ("forward", "backward", "setup_context"):
        return True
    decorators = getattr(node, "decorator_list", [])
    return any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in decorators)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_every_public_name_has_a_docstring(path: Path) -> None:
    missing = [
        name
        for name, node in _public_definitions(path)
        if not ast.get_docstring(node) and not _explains_itself(name, node)
    ]
    if path.name == "__init__.py" and not path.read_text().strip():
        missing = ["module"]
    assert not missing, f"{_name(path)}: no docstring on {missing}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_nothing_is_half_done_or_hidden(path: Path) -> None:
    """No NotImplementedError, no exception swallowed, no note to self, no path of one machine."""
    found = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node):
            found.append(f"line {node.lineno}: NotImplementedError")
        if isinstance(node, ast.ExceptHandler) and all(
            isinstance(b, ast.Pass | ast.Continue) for b in node.body
        ):
            found.append(f"line {node.lineno}: an exception swallowed")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if re.search(r"\b(TODO|FIXME|XXX)\b|(?<![\w.])/(?:work|root|home)/", line):
            found.append(f"line {number}: {line.strip()}")
    assert not found, f"{_name(path)}: {found}"


@pytest.mark.parametrize("package", ["realization", "bmojo_core", "bmojo_core.ops"])
def test_what_a_package_exports_exists(package: str) -> None:
    import importlib

    module = importlib.import_module(package)
    assert len(module.__all__) == len(set(module.__all__)) and module.__all__
    for name in module.__all__:
        assert getattr(module, name).__doc__, f"{package}.{name} has no docstring"


def test_test_files_have_different_names() -> None:
    """pytest imports them by name alone."""
    counts = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in counts.items() if count > 1]
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids="-".join)
def test_ruff(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
