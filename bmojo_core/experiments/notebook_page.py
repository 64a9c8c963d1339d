"""An executed notebook as one HTML page: no file beside it, no request to anywhere.

nbconvert turns cells into HTML; around that stands a small style sheet of our own. Code is folded,
pictures are data, formulas are set by a MathJax bundle that is part of the page, and what went to
stderr (progress bars) is left out. Of MyST's markup the notebooks use `:::{dropdown} Title` and its
kin, equation labels and a few roles; those are translated here.
"""

from __future__ import annotations

import copy
import html
import re

import nbformat
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

_TEMPLATE = """
{%- extends 'basic/index.html.j2' -%}
{% block input %}<details class="code"><summary>code</summary>{{ super() }}</details>{% endblock %}
"""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
body { font: 1rem/1.55 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
pre, code { font: .88rem/1.45 ui-monospace, monospace; }
pre { overflow-x: auto; margin: .4rem 0; }
details, aside { border-left: 3px solid var(--line); padding: .1rem .8rem; margin: .6rem 0; }
details.code > summary { color: #888; font-size: .85rem; cursor: pointer; }
.highlight { background: #f7f7f7; color: #222; padding: .1rem .6rem; border-radius: 4px; }
.output_wrapper { margin: .6rem 0; overflow-x: auto; }
table { border-collapse: collapse; }
td, th { padding: .2rem .7rem; border-bottom: 1px solid var(--line); }
.anchor-link { display: none; }
"""

_MATHJAX = """<script>MathJax = {{
  tex: {{inlineMath: [['$', '$'], ['\\\\(', '\\\\)']], tags: 'ams'}},
  options: {{enableMenu: false, ignoreHtmlClass: 'output_wrapper|highlight'}}
}};</script>
<script>{bundle}</script>"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
{mathjax}
</head>
<body>
{body}
</body>
</html>
"""

_FENCE = re.compile(r"^(:{3,})(?:\{([\w-]+)\} *(.*))?$")
_OPTION = re.compile(r"^:[\w-]+:.*$")
_LABELLED = re.compile(r"\$\$(?P<tex>(?:(?!\$\$).)+)\$\$ *\((?P<label>[\w:-]+)\)", re.DOTALL)
_ROLE = re.compile(r"\{(?P<role>[\w:-]+)\}`(?P<text>[^`]+)`")


def page(notebook: nbformat.NotebookNode, mathjax: str | None = None) -> str:
    """The page of an executed notebook.

    Parameters
    ----------
    notebook : NotebookNode
        With outputs. Not changed.
    mathjax : str, optional
        The text of a MathJax 3 bundle that needs no further file; without it formulas stay as
        typed.

    Returns
    -------
    str
        A complete HTML document.
    """
    readable = copy.deepcopy(notebook)
    for cell in readable.cells:
        if cell.cell_type == "markdown":
            cell.source = plain_markdown(cell.source)
        elif cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            cell.metadata["alt"] = alt_text(cell)
    exporter = HTMLExporter(
        raw_template=_TEMPLATE, exclude_input_prompt=True, exclude_output_prompt=True
    )
    body, _ = exporter.from_notebook_node(readable)
    return _PAGE.format(
        title=html.escape(title(notebook)),
        style=_STYLE + HtmlFormatter(style="default").get_style_defs(".highlight"),
        mathjax="" if mathjax is None else _MATHJAX.format(bundle=mathjax),
        body=body,
    )


def title(notebook: nbformat.NotebookNode) -> str:
    """The first heading of a notebook."""
    headings = (
        re.search(r"^# +(.+)$", cell.source, re.MULTILINE)
        for cell in notebook.cells
        if cell.cell_type == "markdown"
    )
    return next((heading[1].strip() for heading in headings if heading), "Notebook")


def alt_text(cell: nbformat.NotebookNode) -> str:
    """What a cell's picture shows, in words: the metadata `mystnb.image.alt`, or nothing."""
    return cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")


def plain_markdown(source: str) -> str:
    """MyST's directives, labels and roles as markdown and HTML that every renderer knows."""
    lines, open_tags, fresh = [], [], False
    for line in source.split("\n"):
        fence = _FENCE.match(line)
        if fence and fence[2]:
            tag, head = _container(fence[2], fence[3])
            open_tags.append(tag)
            lines += [head, ""]
        elif fence and open_tags:
            lines += ["", f"</{open_tags.pop()}>", ""]
        elif not (fresh and _OPTION.match(line)):
            lines.append(line)
        fresh = bool(fence and fence[2]) or (fresh and bool(_OPTION.match(line)))
    text = _LABELLED.sub(_labelled_equation, "\n".join(lines))
    return _ROLE.sub(_role, text)


def _container(directive: str, argument: str) -> tuple[str, str]:
    """The HTML element that stands for a directive, and its opening lines."""
    name = html.escape(argument or directive.capitalize())
    if directive == "dropdown":
        return "details", f"<details><summary>{name}</summary>"
    return "aside", f"<aside><strong>{name}</strong>"


def _labelled_equation(match: re.Match) -> str:
    return f"$$\\begin{{equation}}\\label{{{match['label']}}}{match['tex']}\\end{{equation}}$$"


def _role(match: re.Match) -> str:
    role, text = match["role"], match["text"]
    if role == "eq":
        return f"$\\eqref{{{text}}}$"
    return f"[{text}]" if role.startswith("cite") else text
