"""The site: it builds without a warning, holds every public name, and needs no other machine."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import browser
import pytest

ROOT = Path(__file__).parents[1]

# What a page shows once its formulas are set: their number, those that MathJax could not read, and
# the pictures, each with its width and the words that stand for it.
SEEN = """(async () => {
  if (window.MathJax) await MathJax.startup.promise;
  const pictures = [...document.querySelectorAll("article img")];
  await Promise.all(pictures.map(p => p.decode().catch(() => null)));
  return {
    formulas: document.querySelectorAll("mjx-container svg").length,
    misread: document.querySelectorAll("mjx-merror, [data-mjx-error]").length,
    raw: document.querySelector("article").innerText.includes("$$"),
    pictures: pictures.map(p => [p.naturalWidth, p.alt]),
  };
})()"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` builds it, warnings being errors."""
    out = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-b", "html", "-d", str(out / "doctrees")]
    result = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(out / "html")],
        env=os.environ | {"no_proxy": "", "https_proxy": "http://127.0.0.1:9"},  # no way out
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return out / "html"


def _described(site: Path) -> set[str]:
    """Full names of all that the pages describe."""
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as stream:
        inventory = InventoryFile.load(stream, "", lambda base, uri: uri)
    return {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}


@pytest.mark.parametrize("package", ["realization", "bmojo_core", "bmojo_core.ops"])
def test_every_public_name_is_described(site: Path, package: str) -> None:
    module = importlib.import_module(package)
    described = _described(site)
    missing = []
    for name in module.__all__:
        value = inspect.unwrap(getattr(module, name))
        home = f"{value.__module__}.{value.__qualname__}"
        if home not in described and f"{package}.{name}" not in described:
            missing.append(home)
    assert not missing


def test_every_chapter_is_there(site: Path) -> None:
    contents = (site / "chapters.html").read_text()
    for path in sorted((ROOT / "notebooks").rglob("[0-9]*.ipynb")):
        page = path.relative_to(ROOT).with_suffix(".html")
        assert (site / page).exists()
        assert page.as_posix() in contents


def _chapter_with_a_picture(site: Path) -> str:
    """A chapter that has formulas and a picture; the notation page while there is none."""
    for path in sorted((site / "notebooks").glob("[0-9]*.html")):
        text = path.read_text()
        if "<img" in text and "math notranslate" in text:
            return f"notebooks/{path.name}"
    return "notation.html"


def test_pages_in_a_browser(site: Path, tmp_path: Path) -> None:
    """Three pages: formulas set, pictures shown, nothing complained about, nothing fetched."""
    if browser.executable() is None:
        pytest.skip("no chromium on PATH")
    pages = ["index.html", "notation.html", _chapter_with_a_picture(site)]
    with browser.open_browser(tmp_path / "profile") as window:
        for name in pages:
            page = window.visit((site / name).as_uri(), SEEN)
            assert page.complaints == [], name
            away = [a for a in page.requests if not a.startswith((site.as_uri(), "data:", "blob:"))]
            assert not away, f"{name} asks for {away}"
            assert page.value["formulas"] > 0 and page.value["misread"] == 0, (name, page.value)
            assert not page.value["raw"], f"{name}: TeX is shown as typed"
            for width, words in page.value["pictures"]:
                assert width > 0 and words, f"{name}: a picture is missing or has no words"
            if name.startswith("notebooks/"):
                assert page.value["pictures"]


def test_the_browser_sees_what_is_wrong(tmp_path: Path) -> None:
    """A missing picture, an error and a request to elsewhere: all three are reported."""
    if browser.executable() is None:
        pytest.skip("no chromium on PATH")
    (tmp_path / "bad.html").write_text(
        "<article>$$x$$<img src='absent.png'><img src='http://127.0.0.1:9/away.png'></article>"
        "<script>setTimeout(() => 0); throw new Error('broken')</script>"
    )
    with browser.open_browser(tmp_path / "profile") as window:
        page = window.visit((tmp_path / "bad.html").as_uri(), SEEN)
    assert "http://127.0.0.1:9/away.png" in page.requests
    assert any("broken" in complaint for complaint in page.complaints)
    assert any("not loaded" in complaint for complaint in page.complaints)
    assert page.value == {"formulas": 0, "misread": 0, "raw": True, "pictures": [[0, ""], [0, ""]]}
