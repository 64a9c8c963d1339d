"""The notebook runner: live output, one self-contained page, nothing written when a cell fails."""

import base64
import io
import re
import struct
import zlib
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from bmojo_core.experiments import notebook_page, run_notebook


def _png() -> bytes:
    """One white pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\x00\xff")
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


PNG = base64.b64encode(_png()).decode()

GOOD = [
    new_markdown_cell("# A small tour\n\nA state $x_t$.\n\n## Train"),
    new_code_cell(
        "import sys\n"
        "for step in range(3):\n"
        "    print(f'\\rstep {step}', end='', file=sys.stderr, flush=True)\n"
        "print(file=sys.stderr)\n"
        "print('accuracy 0.9')"
    ),
    new_code_cell(
        "from base64 import b64decode\nfrom IPython.display import Image\n"
        f"Image(b64decode('{PNG}'))",
        metadata={"mystnb": {"image": {"alt": "one white pixel"}}},
    ),
    new_code_cell("from pathlib import Path\nPath('here.txt').exists()"),
]


def _write(path: Path, cells: list) -> Path:
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_a_notebook_becomes_a_page(tmp_path: Path, capfd) -> None:
    source = _write(tmp_path / "tour.ipynb", GOOD)
    (tmp_path / "here.txt").touch()  # the notebook runs in its own folder
    before, out = source.read_bytes(), tmp_path / "out" / "tour"
    bundle = tmp_path / "tex-svg.js"
    bundle.write_text("/* the bundle */")
    status = run_notebook.main([str(source), "--out", str(out), "--mathjax", str(bundle)])
    terminal = capfd.readouterr()
    assert status == 0, terminal.err
    assert source.read_bytes() == before
    assert sorted(p.name for p in out.iterdir()) == ["figure-01.png", "index.html"]
    assert (out / "figure-01.png").read_bytes() == _png()

    # In the terminal: headings, printed lines, the last state of a bar, values.
    assert "# A small tour" in terminal.out and "## Train" in terminal.out
    assert "accuracy 0.9" in terminal.out and "True" in terminal.out
    assert "step 2\n" in terminal.err and "step 1" not in terminal.err

    # In the page: everything but the bar, and no address that a browser would fetch.
    html = (out / "index.html").read_text()
    assert "<title>A small tour</title>" in html and "/* the bundle */" in html
    assert "accuracy 0.9" in html and "step 2" not in html and "$x_t$" in html
    assert f"data:image/png;base64,{PNG}" in html
    assert 'alt="one white pixel"' in html
    fetched = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)|url\(([^)]*)\)|@import""", html)
    assert {a or b for a, b in fetched if not (a or b).startswith("#")} <= {
        "data:,",
        f"data:image/png;base64,{PNG}",
    }


def test_a_failing_cell_leaves_the_folder_as_it_was(tmp_path: Path, capfd) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("the last good run")
    failing = [*GOOD[:2], new_code_cell("window = 0\nraise ValueError('window must be positive')")]
    source = _write(tmp_path / "bad.ipynb", failing)
    assert run_notebook.main([str(source), "--out", str(out)]) == 1
    error = capfd.readouterr().err
    assert "bad.ipynb: cell 2 failed" in error
    assert "ValueError: window must be positive" in error and "window = 0" in error
    assert {p.name: p.read_text() for p in out.iterdir()} == {"index.html": "the last good run"}


def test_a_dead_kernel_is_named(tmp_path: Path, capfd) -> None:
    source = _write(tmp_path / "dead.ipynb", [new_code_cell("import os\nos._exit(1)")])
    assert run_notebook.main([str(source), "--out", str(tmp_path / "out")]) == 1
    assert "the kernel died in cell 0" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.ipynb", "--out", "out"], "absent.ipynb: no such notebook"),
        (["text.ipynb", "--out", "out"], "text.ipynb: not a notebook"),
        (["text.ipynb", "--out", "text.ipynb"], "--out text.ipynb: exists and is not a folder"),
        (["text.ipynb", "--out", "out", "--mathjax", "absent.js"], "--mathjax absent.js: no such"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.ipynb").write_text("this is prose")
    assert run_notebook.main(arguments) == 1
    assert message in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["text.ipynb"]


def test_files_are_put_in_place_whole(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("old")
    with pytest.raises(FileNotFoundError):
        run_notebook.write_whole({"index.html": b"new", "absent/figure.png": b""}, tmp_path)
    assert (tmp_path / "index.html").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "shown"), [(io.StringIO(), "3/3\ndone\n"), (_Screen(), "\r1/3\r2/3\r3/3\ndone\nx")]
)
def test_bars_move_on_a_terminal_only(stream, shown) -> None:
    terminal = run_notebook.Terminal(stream)
    for text in ("\r1/3", "\r2/3\r", "3/3\ndo", "ne\nx"):
        terminal.write(text)
    assert stream.getvalue() == shown


def test_myst_becomes_markdown() -> None:
    source = (
        "See {eq}`c01-state` in {cite:t}`kalman1960` and {term}`state`.\n\n"
        "$$\nx = 1\n$$ (c01-state)\n\n"
        "::::{dropdown} The solution\n:open:\nIt is *one*.\n\n:::{note}\nInner\n:::\n::::\n"
    )
    text = notebook_page.plain_markdown(source)
    assert r"See $\eqref{c01-state}$ in [kalman1960] and state." in text
    assert "$$\\begin{equation}\\label{c01-state}\nx = 1\n\\end{equation}$$" in text
    order = ["<details><summary>The solution</summary>", "It is *one*.", "<aside>", "Inner"]
    order += ["</aside>", "</details>"]
    places = [text.index(piece) for piece in order]
    assert places == sorted(places)
    assert ":::" not in text and ":open:" not in text


def test_a_page_without_mathjax_or_heading() -> None:
    cell = new_code_cell("print(1)", outputs=[new_output("stream", name="stdout", text="1 < 2\n")])
    notebook = new_notebook(cells=[cell])
    html = notebook_page.page(notebook)
    assert "<title>Notebook</title>" in html and "<script" not in html and "1 &lt; 2" in html
    assert "alt" not in cell.metadata  # the notebook itself is not changed
