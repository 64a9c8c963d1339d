"""Needles in a haystack: some sentences among many state numbers; which number belongs to a key?

    instruction | filler .. filler NEEDLE filler .. NEEDLE .. filler | question answer

    single      one needle, and its value is asked
    multikey    several needles with different keys, one of them is asked
    multivalue  several values for one key, all are asked
    multiquery  several keys with a value each, all are asked

The haystack is a repeated sentence (``"noise"``) or needles of other keys (``"needle"``).  Kinds,
key and value types and the score are those of RULER (Hsieh and others 2024); the sentences are our
own, and nothing is downloaded.  Tokens are bytes or words, see `bmojo_core.tasks.text_tokens`.

Symbols: N examples, L sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.random import Generator
from torch import Tensor

from bmojo_core.batches import IGNORED
from bmojo_core.tasks._draws import check_integers
from bmojo_core.tasks.needle_text import (
    ADJECTIVES,
    FILLER,
    KINDS,
    NOUNS,
    answer,
    instruction,
    needle_sentence,
    question,
)
from bmojo_core.tasks.text_tokens import TOKENIZERS, Tokenizer


@dataclass(frozen=True)
class NeedleExamples:
    """A batch of needle tasks as tensors and as text.

    Attributes
    ----------
    input_ids, labels
        Both (N, L) int64.  A row is prompt and answer, then padding (id 0).  ``labels`` holds the
        next token of the answer at the position that must say it, -100 elsewhere.
    prompt_length
        Tokens (N,) before the answer: ``input_ids[i, :prompt_length[i]]`` is what to continue.
    prompts, answers
        The texts; each answer is a tuple of the values that must appear.
    tokenizer
        With ``encode``, ``decode`` and ``vocab_size``.
    """

    input_ids: Int[Tensor, "N L"]
    labels: Int[Tensor, "N L"]
    prompt_length: Int[Tensor, "N"]
    prompts: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    tokenizer: Tokenizer


def needle(
    num_examples: int,
    seq_len: int,
    kind: str = "single",
    haystack: str = "noise",
    count: int = 4,
    key_type: str = "words",
    value_type: str = "numbers",
    tokens: str = "words",
    depth: float | None = None,
    seed: int = 0,
) -> NeedleExamples:
    """Examples of finding needles in a haystack.

    Parameters
    ----------
    num_examples, seq_len
        N and L; the haystack is as long as fits.
    kind
        ``"single"``, ``"multikey"``, ``"multivalue"`` or ``"multiquery"``.
    haystack
        ``"noise"`` or ``"needle"``.
    count
        Needles of the three latter kinds, at least 2.
    key_type, value_type
        ``"words"`` (keys only), ``"numbers"`` of seven digits, or ``"uuids"``.
    tokens
        ``"words"`` or ``"bytes"``.
    depth
        Where in the haystack the needles stand, 0 (first) to 1 (last); None draws places.
    seed
        Equal seeds give equal examples.

    Raises
    ------
    ValueError
        For an unknown choice, or when instruction, needles, question and answer do not fit in
        ``seq_len`` at the longest keys; the message says what would fit.
    """
    check_integers(num_examples=num_examples, seq_len=seq_len)
    _check(kind, haystack, count, key_type, value_type, tokens, depth)
    tokenizer = TOKENIZERS[tokens]()
    make = _Maker(kind, haystack, count, key_type, value_type, depth, tokenizer)
    needed = make.longest_without_haystack()
    if seq_len < needed:
        raise ValueError(
            f"seq_len must be at least {needed} {tokens} for kind {kind!r} with keys of type "
            f"{key_type!r} and values of type {value_type!r}, got {seq_len}"
        )
    rng = np.random.default_rng(seed)
    return _as_tensors(
        [make.example(rng, seq_len) for _ in range(num_examples)], seq_len, tokenizer
    )


def string_match_all(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Mean over examples of the share of values that appear in the prediction, ignoring case.

    Parameters
    ----------
    predictions
        What the model said, one text an example.
    answers
        The values that had to be named, one tuple an example.

    Raises
    ------
    ValueError
        When there are no examples, an example without values, or the numbers differ.
    """
    if len(predictions) != len(answers) or not len(answers) or not all(len(a) for a in answers):
        raise ValueError(
            f"answers must be one non-empty tuple for each of {len(predictions)} predictions, "
            f"got {len(answers)}"
        )
    shares = [
        np.mean([value.lower() in said.lower() for value in values])
        for said, values in zip(predictions, answers, strict=True)
    ]
    return float(np.mean(shares))


@dataclass(frozen=True)
class _Maker:
    """Texts of one kind."""

    kind: str
    haystack: str
    count: int
    key_type: str
    value_type: str
    depth: float | None
    tokenizer: Tokenizer

    def example(self, rng: Generator, seq_len: int) -> tuple[str, tuple[str, ...]]:
        """A prompt with as much haystack as fits, and the values to be named."""
        needles = self._needles(rng)
        asked = [needles[rng.integers(len(needles))]] if self.kind == "multikey" else needles
        asked_keys = tuple(dict.fromkeys(key for key, _ in asked))
        straws = self._straws(rng, needles, seq_len - self._fixed_length(needles, asked))
        places = self._places(rng, len(needles), len(straws))
        lines = _merge(straws, [needle_sentence(*n) for n in needles], places)
        prompt = instruction() + "".join(" " + line for line in lines) + question(asked_keys)
        return prompt, tuple(value for _, value in asked)

    def longest_without_haystack(self) -> int:
        """Tokens of the longest example that has no haystack: what every ``seq_len`` must hold."""
        n = 1 if self.kind == "single" else self.count
        longest = [(_longest(self.key_type, self.tokenizer), _LONGEST[self.value_type])] * n
        return self._fixed_length(longest, longest[:1] if self.kind == "multikey" else longest)

    def _fixed_length(self, needles: list[tuple[str, str]], asked: list[tuple[str, str]]) -> int:
        """Tokens of all but the haystack; texts meet at spaces, where no token spans both."""
        keys = [key for key, _ in asked]
        keys = keys[:1] if self.kind == "multivalue" else keys
        parts = [instruction(), question(tuple(keys)), answer(tuple(v for _, v in asked))]
        return sum(map(self.tokenizer.count, parts)) + sum(
            self.tokenizer.count(" " + needle_sentence(*n)) for n in needles
        )

    def _needles(self, rng: Generator) -> list[tuple[str, str]]:
        n = 1 if self.kind == "single" else self.count
        values = _different(rng, self.value_type, n, set())
        keys = _different(rng, self.key_type, 1 if self.kind == "multivalue" else n, set())
        return list(zip(keys * n if self.kind == "multivalue" else keys, values, strict=True))

    def _straws(self, rng: Generator, needles: list[tuple[str, str]], room: int) -> list[str]:
        """Sentences of the haystack, as many as fit into ``room`` tokens."""
        if self.haystack == "noise":
            return [FILLER] * (room // self.tokenizer.count(" " + FILLER))
        keys, values = {k for k, _ in needles}, {v for _, v in needles}
        straws: list[str] = []
        while True:
            (key,) = _different(rng, self.key_type, 1, keys)
            (value,) = _different(rng, self.value_type, 1, values)
            straw = needle_sentence(key, value)
            room -= self.tokenizer.count(" " + straw)
            if room < 0:
                return straws
            straws.append(straw)

    def _places(self, rng: Generator, needles: int, straws: int) -> list[int]:
        """For each needle, how many straws stand before it."""
        if self.depth is not None:
            return [round(self.depth * straws)] * needles
        return sorted(rng.integers(0, straws + 1, needles).tolist())


def _merge(straws: list[str], needles: list[str], places: list[int]) -> list[str]:
    """Put needle i before straw ``places[i]``; places ascend."""
    lines, done = [], 0
    for sentence, place in zip(needles, places, strict=True):
        lines += [*straws[done:place], sentence]
        done = place
    return lines + straws[done:]


def _as_tensors(
    examples: list[tuple[str, tuple[str, ...]]], seq_len: int, tokenizer: Tokenizer
) -> NeedleExamples:
    ids = np.zeros((len(examples), seq_len), np.int64)
    labels = np.full_like(ids, IGNORED)
    lengths = np.zeros(len(examples), np.int64)
    for row, (prompt, values) in enumerate(examples):
        before, said = tokenizer.encode(prompt), tokenizer.encode(answer(values))
        p, end = len(before), len(before) + len(said)
        ids[row, :end] = before + said
        labels[row, p - 1 : end - 1] = said
        lengths[row] = p
    prompts, answers = zip(*examples, strict=True)
    tensors = (torch.from_numpy(x) for x in (ids, labels, lengths))
    return NeedleExamples(*tensors, prompts, answers, tokenizer)


# -- keys and values ------------------------------------------------------------------------------


def _words(rng: Generator) -> str:
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


def _number(rng: Generator) -> str:
    return str(rng.integers(1_000_000, 10_000_000))


def _uuid(rng: Generator) -> str:
    h = rng.bytes(16).hex()
    return "-".join((h[:8], h[8:12], h[12:16], h[16:20], h[20:]))


_DRAW: dict[str, Callable[[Generator], str]] = {
    "words": _words, "numbers": _number, "uuids": _uuid,
}  # fmt: skip
_LONGEST = {"numbers": "1" * 7, "uuids": "-".join("1" * n for n in (8, 4, 4, 4, 12))}


def _longest(key_type: str, tokenizer: Tokenizer) -> str:
    """A key with the most tokens."""
    if key_type != "words":
        return _LONGEST[key_type]
    return "-".join(max(words, key=tokenizer.count) for words in (ADJECTIVES, NOUNS))


def _different(rng: Generator, what: str, n: int, taken: set[str]) -> list[str]:
    """n keys or values that differ from one another and from those taken."""
    drawn: dict[str, None] = {}
    while len(drawn) < n:
        new = _DRAW[what](rng)
        if new not in taken:
            drawn[new] = None
    return list(drawn)


def _check(kind, haystack, count, key_type, value_type, tokens, depth) -> None:
    choices = {
        "kind": (kind, KINDS),
        "haystack": (haystack, ("noise", "needle")),
        "key_type": (key_type, tuple(_DRAW)),
        "value_type": (value_type, tuple(_LONGEST)),
        "tokens": (tokens, tuple(TOKENIZERS)),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    check_integers(2, count=count)
    most = len(ADJECTIVES) * len(NOUNS) // 2
    if key_type == "words" and count > most:
        raise ValueError(f"count must be at most {most} when keys are words, got {count}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1] or None, got {depth}")
