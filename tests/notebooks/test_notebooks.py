"""What every notebook keeps to, so that stored outputs are a reference and pictures have words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(
    path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
)
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def _cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == kind and cell.source.strip()]


def _outputs(path: Path) -> Iterator[tuple[nbformat.NotebookNode, nbformat.NotebookNode]]:
    for cell in _cells(path, "code"):
        for output in cell.outputs:
            yield cell, output


def test_every_cell_was_executed_in_order(path: Path) -> None:
    """nbval compares nothing where the count is missing."""
    counts = [cell.execution_count for cell in _cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))


def test_no_magic_and_no_shell(path: Path) -> None:
    """Such cells pass even when they fail."""
    for cell in _cells(path, "code"):
        bad = [line for line in cell.source.split("\n") if re.match(r"\s*[%!]", line)]
        assert not bad, bad
        ast.parse(cell.source)  # nothing but Python
        # A trailing semicolon does not hide a value from nbval.
        assert not cell.source.rstrip().endswith(";"), cell.id


def test_it_proves_something(path: Path) -> None:
    source = "\n".join(cell.source for cell in _cells(path, "code"))
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source)))


def test_every_figure_has_words(path: Path) -> None:
    for cell, output in _outputs(path):
        if {"image/png", "image/jpeg"} & set(output.get("data", {})):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt.split()) >= 4, f"cell {cell.id}: say in words what the figure shows"


def test_outputs_can_be_compared(path: Path) -> None:
    """No error, no progress bar, nothing whose bytes change from run to run."""
    for cell, output in _outputs(path):
        assert output.output_type != "error", cell.id
        assert output.get("name") != "stderr", f"cell {cell.id} keeps stderr"
        assert "image/svg+xml" not in output.get("data", {}), cell.id


def test_it_is_a_chapter(path: Path) -> None:
    """One first-level heading, at the top."""
    text = [re.sub(r"```.*?```", "", c.source, flags=re.DOTALL) for c in _cells(path, "markdown")]
    headings = re.findall(r"^# .+$", "\n".join(text), re.MULTILINE)
    assert len(headings) == 1 and text[0].startswith("# "), headings


def test_only_public_names_are_used(path: Path) -> None:
    source = "\n".join(cell.source for cell in _cells(path, "code"))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and re.match(
            "realization|bmojo_core", node.module or ""
        ):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not [name for name in names if name.startswith("_")], ast.unparse(node)


def test_it_says_nothing_of_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:work|root|home|tmp)/", text)
