"""What each layer remembered, and why.

`memory_trace` reads a sequence once and returns, for every B'MOJO layer, the score of each token
(its innovation, or whatever the policy measures), the positions that the eidetic memory held while
each chunk was read, and how each query divided its attention between window, fading and eidetic
tokens.

Symbols
-------
b, l    batch, length              n, c     chunks, tokens a chunk
m_f, m_e  fading and eidetic tokens  h      heads
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bmojo_core.config import BMojoConfig
from bmojo_core.layers.bmojo import MemoryAttention, Watched
from bmojo_core.layers.eidetic import EMPTY, storing_delay
from bmojo_core.modeling import BMojoForCausalLM


@dataclass(frozen=True)
class LayerTrace:
    """One layer's memory while a sequence was read.

    Attributes
    ----------
    layer
        Index of the sublayer in the stack.
    score
        Score of every token (b, l): with the paper's policy, its innovation.  Where tokens may be
        stored only behind the window, the latest ones are no candidates yet: -inf.
    position, valid
        Positions held in eidetic memory during each chunk (b, n, m_e), and which places are filled.
    mass
        Share of each query's attention, mean over heads (b, l, 3): window, fading, eidetic.  Behind
        a memory gate it is the share that reaches the output: a closed one leaves all to the
        window.
    eidetic_mass
        The same share for each eidetic token (b, l, m_e): column j of a query in chunk n belongs to
        ``position[:, n, j]``.
    chunk, window
        Tokens a chunk, and inputs a query sees directly.
    """

    layer: int
    score: Float[Tensor, "b l"]
    position: Int[Tensor, "b n e"]
    valid: Bool[Tensor, "b n e"]
    mass: Float[Tensor, "b l 3"]
    eidetic_mass: Float[Tensor, "b l e"]
    chunk: int
    window: int

    def remembered(self, row: int = 0, chunk: int = -1) -> list[int]:
        """Positions in memory while ``chunk`` was read, oldest first."""
        return self.position[row, chunk][self.valid[row, chunk]].tolist()

    def stored(self, row: int = 0) -> list[int]:
        """Every position that was in memory during some chunk, oldest first."""
        return sorted(set(self.position[row][self.valid[row]].tolist()))

    def evicted(self, row: int = 0) -> list[tuple[int, int]]:
        """(position, chunk at whose beginning it had been given up), in order of chunk."""
        gone, before = [], set()
        for n in range(self.position.shape[1]):
            now = set(self.remembered(row, n))
            gone += [(position, n) for position in sorted(before - now)]
            before = now
        return gone

    def attention_to(self, position: int, row: int = 0) -> Float[Tensor, "l"]:
        """Share of every query's attention (l,) on a token as it stands in eidetic memory."""
        l = self.eidetic_mass.shape[1]
        chunk_of_query = torch.arange(l, device=self.position.device) // self.chunk
        here = (self.position[row] == position) & self.valid[row]  # (n, m_e)
        return (self.eidetic_mass[row] * here[chunk_of_query]).sum(-1)


@torch.no_grad()
def memory_trace(
    model: BMojoForCausalLM,
    input_ids: Int[Tensor, "b l"],
    memory_scores: Float[Tensor, "b l"] | None = None,
) -> list[LayerTrace]:
    """Read a batch and say what every B'MOJO layer stored, when, and who attended to it.

    Parameters
    ----------
    model
        A model with at least one ``bmojo`` sublayer.
    input_ids
        Token ids (b, l), without padding.
    memory_scores
        For ``selection="oracle"``.

    Raises
    ------
    ValueError
        When the model has no B'MOJO layer.
    """
    layers = {
        index: layer.attention
        for index, layer in enumerate(model.model.layers)
        if isinstance(getattr(layer, "attention", None), MemoryAttention)
    }
    if not layers:
        raise ValueError(f"the model has no 'bmojo' sublayer: {set(model.config.layer_types)}")
    with _watching(layers) as seen:
        model.model(input_ids, use_cache=False, memory_scores=memory_scores)
    return [_layer_trace(index, seen[index], model.config) for index in layers]


@contextmanager
def _watching(layers: dict[int, MemoryAttention]) -> Iterator[dict[int, Watched]]:
    seen: dict[int, Watched] = {}
    for index, layer in layers.items():
        layer.watchers.append(lambda watched, index=index: seen.__setitem__(index, watched))
    try:
        yield seen
    finally:
        for layer in layers.values():
            layer.watchers.pop()


def _layer_trace(layer: int, seen: Watched, config: BMojoConfig) -> LayerTrace:
    eidetic = slice(config.num_fading_tokens, None)
    mass, each = _shares(seen, config.num_fading_tokens)
    delay = min(storing_delay(config), seen.score.shape[1])  # memory sees the stream that much late
    score = F.pad(seen.score[:, delay:], (0, delay), value=EMPTY)
    return LayerTrace(
        layer, score, seen.memory.position[:, :, eidetic], seen.memory.valid[:, :, eidetic],
        mass, each, seen.chunk, seen.window,
    )  # fmt: skip


def attention_mass(seen: Watched, fading: int) -> Float[Tensor, "b l 3"]:
    """Share of attention on window, fading and eidetic tokens, query by query."""
    return _shares(seen, fading)[0]


def _shares(seen: Watched, fading: int) -> tuple[Float[Tensor, "b l 3"], Float[Tensor, "b l e"]]:
    """Shares by type of memory, and of every eidetic token.

    One block of queries at a time, each against the keys of its window: linear in l.
    """
    l = seen.q.shape[1]
    blocks = [
        _weights(seen, start, min(start + seen.chunk, l)) for start in range(0, l, seen.chunk)
    ]
    memory = seen.memory.valid.shape[2]
    mass, each = [], []
    for weight in blocks:
        parts = weight.split((weight.shape[-1] - memory, fading, memory - fading), -1)
        mass.append(torch.stack([part.sum(-1) for part in parts], -1))
        each.append(parts[2])
    return torch.cat(mass, 1), torch.cat(each, 1)


def _weights(seen: Watched, start: int, stop: int) -> Float[Tensor, "b q keys"]:
    """Attention of the queries of one chunk, mean over heads: window first, then memory.

    Behind gates g, head by head, the weights with which values reach the output:
    g softmax(all) + (1 - g) softmax(window).
    """
    h, g = seen.q.shape[2], seen.k.shape[2]
    first = max(0, start - seen.window + 1)
    q = seen.q[:, start:stop].float() * seen.q.shape[-1] ** -0.5
    window = seen.k[:, first:stop].repeat_interleave(h // g, 2).float()
    n = start // seen.chunk
    memory = seen.memory.k[:, n].repeat_interleave(h // g, 2).float()
    query = torch.arange(start, stop, device=q.device)[:, None]
    key = torch.arange(first, stop, device=q.device)
    visible = (key <= query) & (key > query - seen.window)
    logits = torch.cat(
        [
            torch.einsum("bqhp,bkhp->bhqk", q, window).masked_fill(~visible, -torch.inf),
            torch.einsum("bqhp,bmhp->bhqm", q, memory).masked_fill(
                ~seen.memory.valid[:, n, None, None], -torch.inf
            ),
        ],
        -1,
    )
    joint = logits.softmax(-1)
    if seen.gate is None:
        return joint.mean(1)
    alone = logits[..., : key.shape[0]].softmax(-1)
    alone = F.pad(alone, (0, memory.shape[1]))
    gate = seen.gate.float()[:, None, None]
    return (gate * joint + (1 - gate) * alone).mean(1)
