"""Token ids of plain English text, without files: bytes, or the words of a fixed vocabulary.

Both are exact: ``decode(encode(text)) == text``.  Id 0 is padding in both.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import lru_cache

from bmojo_core.tasks.needle_text import (
    ADJECTIVES,
    FILLER,
    NOUNS,
    instruction,
    needle_sentence,
    question,
)

PIECE = re.compile(r" ?[A-Za-z]+|[^A-Za-z]")  # a word with the space before it, or one sign


class Bytes:
    """UTF-8 bytes; the zero byte, which no text holds, is padding."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises
        ------
        ValueError
            When the text holds a zero byte.
        """
        if "\0" in text:
            raise ValueError("text must not hold zero bytes, they are padding")
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; broken characters are replaced by a mark."""
        return bytes(int(i) for i in ids if int(i)).decode(errors="replace")

    def count(self, text: str) -> int:
        """Number of bytes."""
        return len(text.encode())


class Words:
    """The words of the needle tasks with the space before them; other text sign by sign."""

    def __init__(self) -> None:
        self._pieces = _vocabulary()
        self._id = {piece: i for i, piece in enumerate(self._pieces)}
        self.vocab_size = len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises
        ------
        ValueError
            For a sign that is not printable ASCII.
        """
        ids = []
        for piece in PIECE.findall(text):
            for part in [piece] if piece in self._id else piece:
                if part not in self._id:
                    raise ValueError(f"text must be printable ASCII, got {part!r}")
                ids.append(self._id[part])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids.

        Raises
        ------
        ValueError
            For an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"ids must be in [0, {self.vocab_size}), got {min(ids)}..{max(ids)}")
        return "".join(self._pieces[i] for i in ids if i)

    def count(self, text: str) -> int:
        """Number of tokens."""
        return len(self.encode(text))


Tokenizer = Bytes | Words
TOKENIZERS: dict[str, type[Bytes] | type[Words]] = {"words": Words, "bytes": Bytes}


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[str, ...]:
    """Padding, every printable sign, and every word of the sentences, alone and after a space."""
    sentences = (instruction(), FILLER, needle_sentence("", ""), question(("",)))
    words = {w.strip() for s in sentences for w in PIECE.findall(s) if w.strip().isalpha()}
    words |= {*ADJECTIVES, *NOUNS}
    words = sorted(w for w in words if len(w) > 1)
    signs = string.digits + string.ascii_letters + string.punctuation + " \n\t"
    return ("", *signs, *(" " + w for w in words), *words)
