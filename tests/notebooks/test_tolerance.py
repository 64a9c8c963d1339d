"""The comparison of notebook outputs: numbers by tolerance, words exactly, stderr not at all."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tolerance():
    """notebooks/conftest.py as a module; nbval is as before when the tests are through."""
    from nbval.plugin import IPyNbCell

    before = IPyNbCell.sanitize, IPyNbCell.compare_outputs
    spec = importlib.util.spec_from_file_location("tolerance", ROOT / "notebooks" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    IPyNbCell.sanitize, IPyNbCell.compare_outputs = before


@given(
    value=st.floats(-1e6, 1e6), relative=st.floats(-1, 1), digits=st.sampled_from(["g", ".3f", "e"])
)
@example(value=0.0, relative=1.0, digits="g")
def test_numbers_are_close_exactly_within_the_tolerance(tolerance, value, relative, digits) -> None:
    other = value * (1 + 4e-3 * relative)
    left, right = f"[{other:{digits}}]", f"[{value:{digits}}]"
    a, b = float(left[1:-1]), float(right[1:-1])
    distance, bound = abs(a - b), tolerance.ABSOLUTE + tolerance.RELATIVE * abs(b)
    assume(abs(distance - bound) > 1e-12 * bound)
    assert tolerance.close(left, right) == (distance < bound)
    assert (tolerance.Output(left) == tolerance.Output(right)) == (distance < bound)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("poles [0.9 0.5]", "poles [0.90001  0.5]", True),  # numpy pads to a common width
        ("poles [0.9 0.5]", "zeros [0.9 0.5]", False),
        ("poles [0.9 0.5]", "poles [0.9]", False),
        ("stable: True", "stable: False", False),
        ("x = -1.0", "x = 1.0", False),
        ("order 3-1", "order 3-2", False),
        ("1e-9", "0", True),
        ("1e-3", "0", False),
        ("nan", "0.5", False),
    ],
)
def test_what_is_the_same(tolerance, left, right, same) -> None:
    assert (tolerance.Output(left) == right) is same
    assert (tolerance.Output(left) != right) is not same


def _cell(source: str, count: int, *outputs) -> nbformat.NotebookNode:
    return new_code_cell(source, execution_count=count, outputs=list(outputs))


def test_nbval_sees_a_wrong_result(tmp_path: Path) -> None:
    def said(text: str, name: str = "stdout"):
        return new_output("stream", name=name, text=text)

    cells = [
        _cell("print('gain', 1.23456)", 1, said("gain 1.2346\n")),
        _cell("import sys; print('97 %', file=sys.stderr)", 2, said("3 %\n", "stderr")),
        _cell("print('gain', 1.25)", 3, said("gain 1.24\n")),
    ]
    path = tmp_path / "three.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    (tmp_path / "conftest.py").write_text((ROOT / "notebooks" / "conftest.py").read_text())
    options = "--nbval --nbval-current-env -p no:cacheprovider -p no:xdist --nbval-sanitize-with"
    command = [sys.executable, "-m", "pytest", *options.split()]
    command += [str(ROOT / "notebooks" / "nbval_sanitize.cfg"), str(path)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 failed, 2 passed" in result.stdout and "Cell 2" in result.stdout
