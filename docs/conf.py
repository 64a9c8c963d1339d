"""Sphinx configuration of the site; it builds without a network.

Chapters are the notebooks with their stored outputs: nbval executes them, not the site. The pages
under api/ are written here from the packages' modules, one page for each.
"""

import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE / "_ext")]

import api_pages  # noqa: E402

# Copies, because Sphinx resolves links between files of its own folder only.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(
    ROOT / "notebooks",
    HERE / "notebooks",
    ignore=shutil.ignore_patterns("*.py", "*.cfg", "checks", "__pycache__", ".*"),
)
api_pages.write(HERE / "api", ("realization", "bmojo_core"))

project = "bmojo"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
author = "The bmojo developers"
project_copyright = "the bmojo developers, Apache-2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinxcontrib.bibtex",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_proof",
    "sphinx_exercise",
    "api_pages",
]
exclude_patterns = ["_ext"]

# Chapters
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"

# Formulas: one file that carries its own glyphs, so the page asks nobody for anything.
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "global"}}

# Pages from docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types together with shapes
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_google_docstring = False
napoleon_use_param = False  # a shape (n, m) is no link to whatever is called n
napoleon_custom_sections = [("Attributes", "params_style")]  # for the same reason
napoleon_use_rtype = False

highlight_language = "none"  # an indented equation is no program

html_theme = "pydata_sphinx_theme"
html_title = "bmojo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {page: [] for page in ("index", "notation", "glossary", "references", "search")}
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
}
