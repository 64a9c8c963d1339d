"""Docstrings written as plain text become pages that say the same."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "docs" / "_ext"))
from plain_docstrings import as_restructured_text, literal_signs

DOCSTRING = """\
Scan |x| with `delta` and *args.

The state obeys

    x_t = a * x_{t-1}              (1)
    y_t = |x_t|

and x_ is kept. Two uses:
- one, which
  goes on;
- two.
So it is.

=====  ====
``a``  *b*
=====  ====

Parameters
----------
x_ : (b, l), "a" | "b"
    Values of |x|, see `scan`.
*args
    More.

Shapes
------
What they are.

Examples
--------
>>> 2 * 3
6
"""

PAGE = r"""
Scan \|x\| with ``delta`` and \*args.

The state obeys


::

    x_t = a * x_{t-1}   (1)
    y_t = |x_t|

and x\_ is kept. Two uses:

- one, which
  goes on;
- two.

So it is.

=====  ====
``a``  *b*
=====  ====

Parameters
----------
x_ : (b, l), "a" \| "b"
    Values of \|x\|, see ``scan``.
*args
    More.

.. rubric:: Shapes

What they are.

Examples
--------
>>> 2 * 3
6
"""


def test_a_docstring_becomes_a_page() -> None:
    assert "\n".join(as_restructured_text(DOCSTRING.split("\n"))).strip() == PAGE.strip()


def test_a_page_has_no_markup_errors() -> None:
    """docutils reads the translation without a complaint, and every sign survives."""
    import docutils.core

    text = "\n".join(as_restructured_text(DOCSTRING.split("\nParameters")[0].split("\n")))
    settings = {"halt_level": 2, "report_level": 2, "warning_stream": False}
    plain = docutils.core.publish_string(text, writer="pseudoxml", settings_overrides=settings)
    shown = plain.decode()
    for piece in ("Scan |x| with", "*args", "x_t = a * x_{t-1}", "x_ is kept", "<bullet_list"):
        assert piece in shown, piece


@pytest.mark.parametrize(
    ("line", "page"),
    [
        ("``a*b`` and a*b", r"``a*b`` and a\*b"),
        (":math:`x_t^*` stays", ":math:`x_t^*` stays"),
        ("`P_min` <= P_max", "``P_min`` <= P_max"),
        ("a lone ` sign", r"a lone \` sign"),
        ("y' and y_{t+1}", r"y' and y\_{t+1}"),
        ("(n + 1)_ and A_, B", r"(n + 1)\_ and A\_, B"),
    ],
)
def test_signs(line: str, page: str) -> None:
    assert literal_signs(line) == page
