"""What a newcomer touches first: the environments agree, the README runs, make speaks plainly."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {
    "environment.yml": {"torch": "pytorch-cpu"},
    "environment-gpu.yml": {"torch": "pytorch-gpu"},
}
COMPILED_AGAINST_TORCH = {"mamba-ssm", "flash-attn", "causal-conv1d"}


def _requirements(lines: list[str]) -> dict[str, SpecifierSet]:
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r.specifier for r in parsed}


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("file", CONDA_NAMES)
def test_conda_environments_agree_with_pyproject(file: str) -> None:
    environment = yaml.safe_load((ROOT / file).read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    found = _requirements([re.sub(r"(?<=[\w-])=(?=\d)", "==", d) for d in conda])
    wanted = _requirements(PROJECT["dependencies"])
    for name, specifier in wanted.items():
        conda_name = CONDA_NAMES[file].get(name, name)
        assert found.get(conda_name) == specifier, f"{file}: {conda_name} should be {specifier}"
    for version in ("3.11", "3.12"):
        assert version in found["python"] and version in SpecifierSet(PROJECT["requires-python"])
    assert pip == ["-e .[notebooks,docs,test]"]
    assert set(found) - {"python", "pip"} >= {CONDA_NAMES[file]["torch"]}
    assert not COMPILED_AGAINST_TORCH & set(found)


def test_the_core_needs_what_it_says_and_no_more() -> None:
    core = ["numpy", "scipy", "torch", "numba", "transformers", "safetensors"]
    core += ["matplotlib", "tqdm", "jaxtyping"]
    assert list(_requirements(PROJECT["dependencies"])) == core
    assert {"notebooks", "docs", "train", "test", "gpu"} == set(EXTRAS)
    assert set(_requirements(EXTRAS["train"])) <= set(_requirements(EXTRAS["test"]))
    for extra in ("notebooks", "docs", "train", "test"):
        assert not COMPILED_AGAINST_TORCH & set(_requirements(EXTRAS[extra]))


def test_constraints_pin_everything_and_fit() -> None:
    pinned = _constraints()
    assert pinned["torch"] == "2.13.0"
    lines = [*PROJECT["dependencies"], *EXTRAS["notebooks"], *EXTRAS["docs"], *EXTRAS["test"]]
    for name, specifier in _requirements(lines).items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert pinned[name] in specifier, f"{name}=={pinned[name]} does not satisfy {specifier}"


def test_citation_names_the_paper_and_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert PROJECT["name"] in citation["title"]
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("B'MOJO") and "2407.06324" in str(paper["identifiers"])
    assert len(paper["authors"]) == 9
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_readme_example_runs_as_printed(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert example.count("\n") <= 25
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stderr
    printed = re.search(r"```python\n.*?```\s*.*?```text\n(.*?)```", readme, re.DOTALL)
    assert result.stdout == printed[1]
    assert not list(tmp_path.iterdir())


def test_readme_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"", readme)
    for link in (a or b for a, b in links):
        assert (ROOT / link.partition("#")[0]).exists(), f"README.md: {link} leads nowhere"
    for command in ("make tour", "make test"):
        assert command in readme


# ------------------------------------------------------------------------ make


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what make reads, and no environment."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def _script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_help_lists_every_target(clone: Path) -> None:
    help_text = _make(clone).stdout
    phony = re.search(r"^\.PHONY:(.*)$", (clone / "Makefile").read_text(), re.MULTILINE)[1]
    for target in ("tour", "test", "lab", "docs", "lint", "help"):
        assert target in phony.split() and re.search(rf"make {target} +\S", help_text), target


def test_an_old_python_is_refused(clone: Path) -> None:
    old = 'case "$*" in -V) echo Python 3.9.2;; *version_info*) exit 1;; esac'
    _script(clone / "python3.9", old)
    result = _make(clone, "test", "PYTHON=./python3.9")
    assert result.returncode != 0
    assert "Python 3.9.2" in result.stderr and "needs Python 3.11 or later" in result.stderr
    assert not (clone / ".venv").exists()


def test_an_absent_python_is_named(clone: Path) -> None:
    result = _make(clone, "test", "PYTHON=./nowhere/python3")
    assert result.returncode != 0
    assert "'./nowhere/python3' does not start" in result.stderr
    assert not (clone / ".venv").exists()


def _installed(clone: Path, pip_status: int) -> None:
    """An environment whose python notes what it is asked to do, and whose pip ends so."""
    asked = f'echo "$*" >> asked\ncase "$*" in *"pip install"*) exit {pip_status};; esac'
    _script(clone / ".venv" / "bin" / "python", asked)
    (clone / ".venv" / ".made").touch()


def test_a_failed_install_says_so_and_is_tried_again(clone: Path) -> None:
    _installed(clone, pip_status=1)
    for attempt in (1, 2):
        result = _make(clone, "test")
        assert result.returncode != 0 and "could not install" in result.stderr
        assert "network" in result.stderr
        assert (clone / "asked").read_text().count("pip install") == attempt


def test_targets_print_the_plain_commands_and_install_once(clone: Path) -> None:
    _installed(clone, pip_status=0)
    first = _make(clone, "test")
    assert first.returncode == 0, first.stderr
    assert "Without make:" in first.stdout
    assert 'pip install -c constraints.txt -e ".[notebooks,docs,test]"' in first.stdout
    assert "pytest -n 2 --dist loadfile --no-loadscope-reorder tests" in first.stdout
    for target in ("test", "lab", "lint"):
        again = _make(clone, target)
        assert again.returncode == 0, again.stderr
        assert "Without make:" in again.stdout and "Installing" not in again.stdout
    assert (clone / "asked").read_text().count("pip install") == 1


def test_the_tour_is_not_run_twice(clone: Path) -> None:
    for name in ("notebooks/00_tour.ipynb", "bmojo_core/__init__.py", "realization/__init__.py"):
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).touch()
    _installed(clone, pip_status=0)
    page = clone / "out" / "tour" / "index.html"
    page.parent.mkdir(parents=True)
    runs = []
    for change in (None, None, "bmojo_core/__init__.py", "notebooks/00_tour.ipynb"):
        if change:
            os.utime(clone / change, (2**31, 2**31))
        result = _make(clone, "tour")
        assert result.returncode == 0 and "out/tour/index.html" in result.stdout
        if change is None:
            page.touch()
            os.utime(page, (2**31 - 9, 2**31 - 9))
        runs.append((clone / "asked").read_text().count("run_notebook"))
    assert runs == [1, 1, 2, 3]


def test_ci_runs_what_a_user_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if "make" in line] == ["exec env CI=1 make test"]
    assert not re.search(r"pip|apt|curl|python", "\n".join(lines))
