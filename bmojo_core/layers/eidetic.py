"""What attention remembers beyond its window: fading tokens and the eidetic memory.

At the beginning s of every chunk of c tokens (appendix B.2; c = 1 is Algorithm 1)

    fading   F_s = ( y_{s-1}, y_{s-1-r}, .. )             m_f outputs of the SSM, r apart
    eidetic  M_s = arg top-m_e { e_i : i < s }             the inputs with the largest scores

and every query of the chunk sees (k, v) of both beside its window.  With c = 1 a query at t has
F_t = (y_{t-w}, ..) and M_t = arg top-m_e { e_i : i <= t }, as the algorithm is printed.

Reading on from a carried state, the candidates are [M | new tokens]: keeping the largest is
associative, so nothing older than M is needed.

Symbols
-------
b, l, d    batch, length, model width          c, n     chunk length, number of chunks
g, p       key-value heads, head width          m_f, m_e  fading and eidetic tokens
e_i        score of token i (``selection``)     f        phase: tokens already read of the chunk
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bmojo_core.config import BMojoConfig
from bmojo_core.layers.rows import align, may_hold, places, slide, take, take_places
from bmojo_core.layers.selection import asks_for
from bmojo_core.layers.shared import with_taken
from bmojo_core.ops import running_top_k
from bmojo_core.ops.innovation.step import insert_compiled

State = TypeVar("State", bound=tuple)  # a named tuple of tensors
EMPTY = float("-inf")  # the score of a place that holds nothing


class Settings(NamedTuple):
    """What a layer reads of its configuration at every token, where a look-up there takes
    microseconds; names and meanings are the configuration's.  Copied as a sequence begins."""

    hidden_size: int
    head_dim: int
    window: int
    num_fading_tokens: int
    num_eidetic_tokens: int
    fading_stride: int
    normalize_fading: bool
    memory_update: str
    memory_chunk: int
    store_in_window: bool
    selection: str
    selection_seed: int
    innovation_taps: int
    normalize_innovation: bool
    key_kernel: int

    @classmethod
    def of(cls, config: BMojoConfig) -> Settings:
        """Copied from a configuration."""
        return cls(*[getattr(config, name) for name in cls._fields])


class Tokens(NamedTuple):
    """Tokens that may be remembered: key, value, score, position in the sequence."""

    k: Float[Tensor, "b s g p"]
    v: Float[Tensor, "b s g p"]
    score: Float[Tensor, "b s"]
    position: Int[Tensor, "b s"]


class Memory(NamedTuple):
    """Memory tokens of every chunk: fading first, then eidetic.

    ``position`` and ``score`` say which token each one is.  They serve inspection and the state,
    not attention: None where nobody asked.
    """

    k: Float[Tensor, "b n m g p"]
    v: Float[Tensor, "b n m g p"]
    valid: Bool[Tensor, "b n m"]
    position: Int[Tensor, "b n m"] | None
    score: Float[Tensor, "b n m"] | None


class InUse(NamedTuple):
    """The memory of the chunk being read; its keys and values stand before the window's ring."""

    valid: Bool[Tensor, "b m"]
    position: Int[Tensor, "b m"]
    score: Float[Tensor, "b m"]


class EideticState(NamedTuple):
    """What memory carries from one stretch of tokens to the next; its size never changes."""

    current: InUse
    best: Tokens  # the m_e largest scores so far, in any order; a step writes in place
    waiting: Tokens  # tokens still too recent to be stored (none if in-window ones may be)
    outputs: Float[Tensor, "b s d"]  # the last outputs of the SSM
    key_sum: Float[Tensor, "b g p"] | None  # of normalised keys; None if no policy needs it


class Before(NamedTuple):
    """What a reading from the beginning finds: those parts of a state that it looks at."""

    waiting: Tokens | None
    outputs: Float[Tensor, "b s d"]
    key_sum: Float[Tensor, "b g p"] | None


def outputs_needed(c: BMojoConfig | Settings) -> int:
    """How many past SSM outputs the predictor and the fading tokens look back on."""
    fading = (c.num_fading_tokens - 1) * c.fading_stride + fading_delay(c)
    return max(c.innovation_taps, fading if c.num_fading_tokens else 0)


def needs(c: BMojoConfig | Settings, field: str) -> bool:
    """Whether the selection policy looks at a field of ``Observed`` that is on demand."""
    return c.num_eidetic_tokens > 0 and asks_for(c.selection, field)


def needs_key_sum(c: BMojoConfig | Settings) -> bool:
    """Whether the selection policy looks at the sum of all past keys."""
    return needs(c, "past_key_sum")


def fading_delay(c: BMojoConfig | Settings) -> int:
    """The newest fading token of a chunk that begins at s is y_{s - delay}."""
    return c.window if c.memory_update == "token" else 1


def storing_delay(c: BMojoConfig | Settings) -> int:
    """How old a token must be to be stored: 0, or old enough to have left every query's window.

    A policy that counts the attention received in the window knows the score no earlier.
    """
    at_once = c.store_in_window and not asks_for(c.selection, "window_mass")
    if at_once or c.num_eidetic_tokens == 0:
        return 0
    return c.window if c.memory_update == "token" else c.window - 1


def chunk_length(c: BMojoConfig | Settings) -> int:
    """Tokens that share one memory."""
    return 1 if c.memory_update == "token" else c.memory_chunk


def nothing_before(c: BMojoConfig | Settings, like: Float[Tensor, "b l g p"]) -> Before:
    """What there is before any token: no tokens, outputs zero."""
    b, _, g, p = like.shape
    wide = torch.promote_types(like.dtype, torch.float32)
    return Before(
        no_tokens(like, storing_delay(c)) if storing_delay(c) else None,
        like.new_zeros(b, outputs_needed(c), c.hidden_size),
        torch.zeros(b, g, p, dtype=wide, device=like.device) if needs_key_sum(c) else None,
    )


def check_goes_on(c: BMojoConfig | Settings, state: EideticState) -> None:
    """A text may go on under another rule than it began with, if it kept what that one looks at.

    Raises
    ------
    ValueError
        Otherwise.
    """
    waits = state.waiting.score.shape[1] >= storing_delay(c)
    if not waits or (state.key_sum is None and needs_key_sum(c)):
        raise ValueError(
            f"selection {c.selection!r} needs what past_key_values has not kept: begun under "
            "another rule, this text must be read again from its beginning"
        )


def no_tokens(like: Float[Tensor, "b l g p"], count: int) -> Tokens:
    """``count`` empty places."""
    b, _, g, p = like.shape
    at = torch.zeros(b, count, dtype=torch.long, device=like.device)
    return Tokens(
        like.new_zeros(b, count, g, p), like.new_zeros(b, count, g, p), at.float() + EMPTY, at
    )


def recall(
    tokens: Tokens, k: int, chunk: int, after: bool = True, details: bool = True
) -> tuple[Memory, Tokens]:
    """M for every chunk of a sequence read from its beginning, and the tokens to be read on.

    ``after``: M also for what follows the sequence.  ``details`` asks for position and score of
    what is remembered.
    """
    score = tokens.score
    if after:
        columns = -(-score.shape[1] // chunk) * chunk + 1
        score = F.pad(score, (0, columns - score.shape[1]), value=EMPTY)
    return _remember(tokens, *running_top_k(score, k, chunk), details)


def eidetic_tokens_from(
    best: Tokens, tokens: Tokens, phase: Int[Tensor, "b"], chunk: int
) -> Memory:
    """The same, reading on from ``best`` at ``phase``: chunks of the aligned grid, and one more."""
    k = best.score.shape[1]
    columns = grid_columns(tokens.score.shape[1], chunk)
    front = -(-k // chunk) * chunk  # whole chunks that hold what was remembered so far
    best, pad = oldest_first(best), no_tokens(best.k, front - k)
    aligned = Tokens(
        align(tokens.k, phase, columns), align(tokens.v, phase, columns),
        align(tokens.score, phase, columns, EMPTY), align(tokens.position, phase, columns),
    )  # fmt: skip
    joined = Tokens(*(torch.cat(parts, 1) for parts in zip(best, pad, aligned, strict=True)))
    index, valid = running_top_k(F.pad(joined.score, (0, 1), value=EMPTY), k, chunk)
    return _remember(joined, index[:, front // chunk :], valid[:, front // chunk :], True)[0]


def oldest_first(best: Tokens) -> Tokens:
    """The same tokens in order of position: of equal scores the selection keeps the first."""
    order = best.position.argsort(dim=1)
    return Tokens(*(take(x, order) for x in best))


def insert_step(best: Tokens, token: Tokens) -> None:
    """Algorithm 1, step 4, in place: one token replaces the smallest score if it is larger.

    Of equal scores the older stays: among several smallest the youngest is given up.
    """
    if insert_compiled(best, token):
        return
    smallest = best.score.amin(1, keepdim=True)
    larger = token.score > smallest  # (b, 1)
    if not may_hold(larger):
        return
    place = best.position.masked_fill(best.score > smallest, -1).argmax(1)
    rows = torch.arange(place.shape[0], device=place.device)
    for old, new in zip(best, token, strict=True):
        larger_here = larger[:, 0].reshape(-1, *[1] * (old.ndim - 2))
        old[rows, place] = torch.where(larger_here, new[:, 0], old[rows, place])


def grid_columns(columns: int, chunk: int) -> int:
    """Columns of a grid of whole chunks that holds ``columns`` tokens at any phase."""
    return -(-(chunk - 1 + columns) // chunk) * chunk


def fading_positions(
    c: BMojoConfig | Settings, chunks: int, phase: Int[Tensor, "b"]
) -> Int[Tensor, "b n f"]:
    """Column (negative: before the new tokens) of each fading token of each chunk."""
    start = torch.arange(chunks, device=phase.device) * chunk_length(c)
    back = (
        fading_delay(c) + torch.arange(c.num_fading_tokens, device=phase.device) * c.fading_stride
    )
    return (start[:, None] - back) - phase[:, None, None]


def first_fading_positions(
    c: BMojoConfig | Settings, chunks: int, device: torch.device
) -> Int[Tensor, "n f"]:
    """The same where every row begins with its first token: no phase, no rows."""
    length, delay, stride = chunk_length(c), fading_delay(c), c.fading_stride
    start = torch.arange(0, chunks * length, length, device=device)
    end = delay + c.num_fading_tokens * stride
    return start[:, None] - torch.arange(delay, end, stride, device=device)


def merge_candidates(waiting: Tokens | None, new: Tokens) -> Tokens:
    """The stream of tokens as memory sees it: late by as many as are waiting."""
    if waiting is None or waiting.score.shape[1] == 0:
        return new
    joined = Tokens(*(torch.cat(pair, 1) for pair in zip(waiting, new, strict=True)))
    return Tokens(*(x[:, : new.score.shape[1]] for x in joined))


def still_waiting(waiting: Tokens | None, new: Tokens, lengths: Int[Tensor, "b"] | None) -> Tokens:
    """The tokens that are too recent to be stored after the new ones have been read."""
    if waiting is None:
        return no_tokens(new.k, 0)
    if waiting.score.shape[1] == 0:
        return waiting
    return Tokens(*(slide(old, x, lengths) for old, x in zip(waiting, new, strict=True)))


def add_to_waiting(waiting: Tokens, mass: Float[Tensor, "b r"]) -> Tokens:
    """Tokens that wait, the latest last, with more attention received by the r latest."""
    older = waiting.score.shape[1] - mass.shape[1]
    more = F.pad(mass, (older, 0)).to(waiting.score.dtype)  # scores stay in float32
    return waiting._replace(score=waiting.score + more)


def join(fading: Memory | None, eidetic: Memory | None) -> Memory:
    """Fading and eidetic tokens side by side; one of the two may be missing."""
    if fading is None or eidetic is None:
        return fading or eidetic
    return each(lambda *pair: torch.cat(pair, 2), fading, eidetic)


def each(function: Callable[..., Tensor], *memories: Memory) -> Memory:
    """The function of every field that is there."""
    fields = zip(*memories, strict=True)
    return Memory(*(None if parts[0] is None else function(*parts) for parts in fields))


def chunk_of(memory: Memory, index: Int[Tensor, "b"]) -> Memory:
    """One chunk's memory of each row."""
    return Memory(*(take(x, index[:, None]) for x in memory))


def where_rows(condition: Bool[Tensor, "b"], yes: State, no: State) -> State:
    """Row by row, the tensors of one or of the other."""
    pick = [
        torch.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(yes, no, strict=True)
    ]
    return type(yes)(*pick)


def as_memory(best: Tokens) -> Memory:
    """The best tokens so far as the memory of one chunk."""
    filled = best.score > EMPTY
    return Memory(*(x[:, None] for x in (best.k, best.v, filled, best.position, best.score)))


def as_tokens(memory: Memory) -> Tokens:
    """The memory of one chunk (n = 1) as tokens with scores: copies, for a state must not keep
    the memories of all chunks alive."""
    score = memory.score.masked_fill(~memory.valid, EMPTY)
    parts = (memory.k, memory.v, score, memory.position)
    return Tokens(*(x[:, 0].clone() for x in parts))


def _remember(
    tokens: Tokens, index: Int[Tensor, "b n k"], valid: Bool[Tensor, "b n k"], details: bool
) -> tuple[Memory, Tokens]:
    k_on, v_on, k, v = with_taken(tokens.k, tokens.v, index, valid)
    tokens = tokens._replace(k=k_on, v=v_on)
    if not details:
        return Memory(k, v, valid, None, None), tokens
    where = places(index, tokens.k.shape[1])
    position, score = (take_places(x, where, index.shape) for x in (tokens.position, tokens.score))
    return Memory(k, v, valid, position, score.masked_fill(~valid, EMPTY)), tokens
