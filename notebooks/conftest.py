"""nbval, with numbers compared as numbers.

Two right runs of a cell on two machines print the same words and almost the same digits: another
BLAS kernel rounds differently. So outputs are cut into words and numbers. The words must be equal,
white space apart, and the numbers a, b must satisfy |a - b| <= ABSOLUTE + RELATIVE |b|. What goes
to stderr, progress bars with their timings, is not compared.
"""

import re
from collections.abc import Callable

from nbval.plugin import IPyNbCell

RELATIVE = 1e-3
ABSOLUTE = 1e-8

# A sign belongs to a number unless a letter, a digit or a closing bracket stands before it ("n-1").
_NUMBER = re.compile(r"((?<![\w)\]])[-+])?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def words_and_numbers(text: str) -> tuple[list[str], list[float]]:
    """The words of a text with every number left out, and the numbers."""
    numbers = [float(match[0]) for match in _NUMBER.finditer(text)]
    return _NUMBER.sub(" # ", text).split(), numbers


def close(left: str, right: str) -> bool:
    """Whether two outputs say the same, numbers within the tolerance."""
    (left_words, a), (right_words, b) = words_and_numbers(left), words_and_numbers(right)
    return left_words == right_words and all(
        abs(x - y) <= ABSOLUTE + RELATIVE * abs(y) for x, y in zip(a, b, strict=True)
    )


class Output(str):
    """The text of an output; equal to another when the two are close."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or (isinstance(other, str) and close(self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other


def _with_tolerance(sanitize: Callable) -> Callable:
    def sanitized(cell: IPyNbCell, text: object) -> object:
        clean = sanitize(cell, text)
        return Output(clean) if isinstance(clean, str) else clean

    return sanitized


IPyNbCell.sanitize = _with_tolerance(IPyNbCell.sanitize)


def _without_stderr(compare: Callable) -> Callable:
    def compared(cell: IPyNbCell, test: list, ref: list, *args: object) -> bool:
        kept = ([out for out in outs if out.get("name") != "stderr"] for outs in (test, ref))
        return compare(cell, *kept, *args)

    return compared


IPyNbCell.compare_outputs = _without_stderr(IPyNbCell.compare_outputs)
