"""Docstrings that are written as plain text, translated to what Sphinx reads.

The docstrings of this project are made for a terminal: sentences, numpydoc sections, and equations
typed in indented lines. In reStructuredText an indented line is a quotation and `*`, `|` and a
final `_` are markup. So here

- a run of indented lines in running text becomes a literal block, as typed;
- those signs are escaped, and `name` becomes a literal;
- a heading that numpydoc does not know becomes a plain heading.

Simple tables, lists, doctests, roles and literal blocks that are there already pass through.
"""

import re
from collections.abc import Iterator

# numpydoc sections whose body is a list of entries with indented descriptions.
ENTRIES = {"Parameters", "Other Parameters", "Returns", "Yields", "Raises", "Warns", "Attributes"}
TEXTS = {"Notes", "Examples", "References", "See Also", "Warnings", "Methods"}

_UNDERLINE = re.compile(r"^[-=~]{3,}\s*$")
_TABLE = re.compile(r"^=+( +=+)+\s*$")
_ITEM = re.compile(r"^([-*+]|\d+[.)])\s+\S")
_DIRECTIVE = re.compile(r"^\.\. ")
_NUMBERED = re.compile(r" {4,}(?=\(\d+\w?\)\s*$)")  # the space before an equation's number
_AS_IT_IS = re.compile(r"(``.+?``|:[\w:]+:`[^`]+`|`[^`]+ <[^`]+>`_)")


def literal_signs(text: str) -> str:
    """One line with `name` as a literal, and `*`, `|`, a final `_` escaped."""
    pieces = _AS_IT_IS.split(text)
    for i in range(0, len(pieces), 2):
        parts = re.split(r"(`[^`]+`)", pieces[i])
        parts[0::2] = [_escape(part) for part in parts[0::2]]
        parts[1::2] = [f"`{part}`" for part in parts[1::2]]
        pieces[i] = "".join(parts)
    return "".join(pieces)


def _escape(text: str) -> str:
    text = re.sub(r"([\\*|`])", r"\\\1", text)
    return re.sub(r"(?<=[\w)\]])_(?!\w)", r"\\_", text)


def as_restructured_text(lines: list[str]) -> list[str]:
    """A whole docstring, translated."""
    result = []
    for title, body in _sections(lines):
        if title in ENTRIES:
            result += [title, "-" * len(title), *_entries(body)]
        elif title in TEXTS:
            result += [title, "-" * len(title), *_running_text(body)]
        else:
            result += [f".. rubric:: {title}", ""] if title else []
            result += _running_text(body)
    return result


def _sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Titles with the lines below them; the first has no title."""
    title, body = "", []
    for i, line in enumerate(lines):
        below = lines[i + 1] if i + 1 < len(lines) else ""
        if line.strip() and _UNDERLINE.match(below) and not _TABLE.match(below):
            yield title, body
            title, body = line.strip(), []
        elif not (title and not body and _UNDERLINE.match(line)):
            body.append(line)
    yield title, body


def _entries(lines: list[str]) -> Iterator[str]:
    """`name : type` lines keep their name for napoleon; types and descriptions are escaped."""
    for line in lines:
        name, colon, kind = line.partition(" : ")
        if line.startswith(" ") or not colon:
            yield literal_signs(line) if line.startswith(" ") else line
        else:
            yield name + colon + _escape(kind).replace("\\`", "`")


def _running_text(lines: list[str]) -> Iterator[str]:
    before, shown = "", ""  # the last line that is not empty, and how it was taken
    table = False
    for i, line in enumerate(lines):
        if _TABLE.match(line):
            table = i + 1 < len(lines) and bool(lines[i + 1].strip())
            yield line
            taken = "table"
        elif table or not line.strip():
            yield line
            taken = "table" if table else shown
        elif line.startswith((">>>", "...")) or (shown == "doctest" and lines[i - 1].strip()):
            yield line
            taken = "doctest"
        elif line.startswith(" "):
            taken = shown if shown in ("literal", "list", "directive") else "literal"
            if taken == "literal" and shown != "literal" and not before.endswith("::"):
                yield from ("", "::", "")
            verbatim = taken in ("literal", "directive")
            yield _NUMBERED.sub("   ", line) if verbatim else literal_signs(line)
        else:
            taken = "list" if _ITEM.match(line) else "text"
            taken = "directive" if _DIRECTIVE.match(line) else taken
            if before and taken != shown and lines[i - 1].strip():
                yield ""
            yield {"directive": str, "list": _keep_mark, "text": literal_signs}[taken](line)
        if line.strip():
            before, shown = line.rstrip(), taken


def _keep_mark(item: str) -> str:
    mark, space, rest = item.partition(" ")
    return mark + space + literal_signs(rest)
