"""Execute a notebook in view of the reader and keep it as one page that needs no network.

    python -m bmojo_core.experiments.run_notebook notebooks/00_tour.ipynb --out out/tour

While it runs, headings, printed lines and progress bars appear in the terminal as they are made.
Then the folder holds

    index.html       text, code, outputs and pictures in a single file
    figure-01.png    the pictures once more, each by itself

Each file is put in place whole, and only after the last cell has succeeded: a cell that fails
leaves the folder as it was, and the command ends with status 1 and the cell's traceback.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import shutil
import sys
import tempfile
from io import TextIOBase
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert.filters import strip_ansi

from bmojo_core.experiments.notebook_page import page

_HEADING = re.compile(r"^(#{1,6}) +(.+?) *$", re.MULTILINE)


class NotebookError(ValueError):
    """A notebook that could not be run; the message says which cell and why."""


class Terminal:
    """A text stream that shows a progress bar's last state only, unless a person watches.

    On a terminal everything passes through. In a file or a pipe a bar would be hundreds of copies
    of one line, so what a carriage return overwrites is dropped.
    """

    def __init__(self, stream: TextIOBase) -> None:
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> None:
        """Pass on the text, or the lines that it completes."""
        if not self._stream.isatty():
            *lines, self._line = (self._line + text).split("\n")
            text = "".join(line.rstrip("\r").rpartition("\r")[2] + "\n" for line in lines)
        self._stream.write(text)
        self._stream.flush()


class WatchedNotebook(NotebookClient):
    """nbclient's runner, which also prints each output the moment it arrives."""

    def __init__(self, notebook: nbformat.NotebookNode, folder: Path) -> None:
        super().__init__(
            notebook,
            timeout=None,
            kernel_name="python3",
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            shutdown_kernel="immediate",
            resources={"metadata": {"path": str(folder)}},
        )
        self._streams = {"stdout": Terminal(sys.stdout), "stderr": Terminal(sys.stderr)}

    def show_headings(self, cell: nbformat.NotebookNode) -> None:
        """Print the headings of a text cell."""
        if cell.cell_type == "markdown":
            for marks, title in _HEADING.findall(cell.source):
                self._streams["stdout"].write(f"\n{marks} {title}\n")

    def output(self, outs, msg, display_id, cell_index):
        """Keep an output, and print what of it is text."""
        content = msg["content"]
        if msg["msg_type"] == "stream":
            self._streams[content["name"]].write(content["text"])
        elif msg["msg_type"] in ("display_data", "execute_result"):
            self._streams["stdout"].write(_as_text(content["data"]))
        return super().output(outs, msg, display_id, cell_index)


def _as_text(data: dict) -> str:
    """What a terminal shows of a display: its text, or that there is a picture or a page."""
    if "image/png" in data or "image/svg+xml" in data:
        return "[a picture, see index.html]\n"
    if "text/html" in data and data.get("text/plain", "<").startswith("<"):
        return "[a page, see index.html]\n"
    return data.get("text/plain", "") + "\n"


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in its own folder and return it with its outputs.

    Parameters
    ----------
    path : Path
        The notebook. The file itself is not changed.

    Raises
    ------
    NotebookError
        The file is no notebook, a cell raised, or the kernel died.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise NotebookError(f"{path}: no such notebook") from None
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise NotebookError(f"{path}: not a notebook ({str(error)[:200]})") from error
    client = WatchedNotebook(notebook, path.resolve().parent)
    columns = str(shutil.get_terminal_size().columns)
    environment = os.environ | {"COLUMNS": columns, "JUPYTER_PREFER_ENV_PATH": "1"}
    with client.setup_kernel(env=environment):
        for index, cell in enumerate(notebook.cells):
            try:
                client.show_headings(cell)
                client.execute_cell(cell, index)
            except CellExecutionError as error:
                if error.ename == "KeyboardInterrupt":
                    raise KeyboardInterrupt from None
                traceback = strip_ansi(error.traceback)
                raise NotebookError(f"{path}: cell {index} failed\n\n{traceback}") from error
            except DeadKernelError as error:
                raise NotebookError(
                    f"{path}: the kernel died in cell {index} (out of memory?)"
                ) from error
    return notebook


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    """The PNG pictures of a notebook, in order."""
    return [
        base64.b64decode(output.data["image/png"])
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


def write_whole(files: dict[str, bytes], folder: Path) -> None:
    """Put files into a folder, each one whole or not at all, in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as staging:
        for name, content in files.items():
            (Path(staging) / name).write_bytes(content)
        for name in files:
            os.replace(Path(staging) / name, folder / name)


def run(path: Path, out: Path, mathjax: Path | None = None) -> None:
    """Execute a notebook and write its page and pictures.

    Parameters
    ----------
    path : Path
        The notebook.
    out : Path
        Folder for index.html and figure-NN.png; made when absent, untouched when a cell fails.
    mathjax : Path, optional
        A MathJax 3 bundle with SVG output (``tex-svg.js``) to set formulas with; it becomes part of
        the page. Without it formulas stay as they are typed.

    Raises
    ------
    NotebookError
        As `execute`; or `mathjax` names no file, or `out` is no folder.
    """
    if mathjax is not None and not mathjax.is_file():
        raise NotebookError(f"--mathjax {mathjax}: no such file")
    if out.exists() and not out.is_dir():
        raise NotebookError(f"--out {out}: exists and is not a folder")
    notebook = execute(path)
    shown = pictures(notebook)
    files = {f"figure-{i:02d}.png": png for i, png in enumerate(shown, start=1)}
    html = page(notebook, mathjax.read_text(encoding="utf-8") if mathjax else None)
    write_whole(files | {"index.html": html.encode()}, out)
    print(f"\nWrote {out / 'index.html'} ({len(shown)} pictures).")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bmojo_core.experiments.run_notebook",
        description="Execute a notebook in view and keep it as one page that needs no network.",
    )
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for index.html")
    parser.add_argument("--mathjax", type=Path, help="MathJax bundle tex-svg.js for the formulas")
    options = parser.parse_args(arguments)
    try:
        run(options.notebook, options.out, options.mathjax)
    except NotebookError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; {options.out} is as it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
