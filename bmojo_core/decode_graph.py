"""One decode step as a CUDA graph: a new token costs one launch.

    logits = graph(token)        the cache has moved on by one token, in its own tensors

A step is many short kernels, and a host launches them more slowly than a GPU runs them.  Captured
once, they are replayed by a single call.  That works because the state has one size at any length
and the step asks the device nothing: what depends on the position is decided by tensors, or by the
host's own count of tokens.  By that count there are two graphs: one for a token that begins a chunk
in some row, with the memory of the new chunk, and a shorter one for all others.  Each is captured
when it is first needed.

The step computes new tensors for what it does not write in place; inside the graph they are copied
back to where the next replay reads.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bmojo_core.cache import BMojoCache
from bmojo_core.config import BMojoConfig
from bmojo_core.layers.bmojo import BMojoState
from bmojo_core.layers.eidetic import EMPTY, chunk_length
from bmojo_core.layers.rows import known
from bmojo_core.modeling import BMojoForCausalLM

WARM_UPS = 3  # kernels are compiled and workspaces made before the capture


class DecodeGraph:
    """The decode step of ``model`` for the batch whose state is ``cache``.

    Parameters
    ----------
    model
        In evaluation mode, on a CUDA device.
    cache
        The state after the prompt.  It belongs to the graph from now on: every call moves it on by
        one token, in place.

    Raises
    ------
    ValueError
        If the model is not on a CUDA device or trains, if nothing has been read yet, or if a
        sublayer's state grows with the sequence (full attention).
    """

    def __init__(self, model: BMojoForCausalLM, cache: BMojoCache) -> None:
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise ValueError(f"model must be on a CUDA device, it is on {device}")
        if model.training:
            raise ValueError("model must be in evaluation mode: model.eval()")
        if cache.is_empty():
            raise ValueError("cache must hold a prompt, nothing has been read yet")
        if "attention" in model.config.layer_types:
            raise ValueError(
                "the state must have one size: full attention ('attention' in layer_types) grows"
            )
        self.model, self.cache = model, cache
        cache.own()
        self.token = torch.zeros(len(cache.position), 1, dtype=torch.long, device=device)
        self.read = cache.position.tolist()  # the one question to the device
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._graph()

    def __call__(self, token: Int[Tensor, "b 1"]) -> Float[Tensor, "b v"]:
        """Logits of the next token; overwritten by the next call."""
        self.token.copy_(token)
        graph, logits = self._graph()
        graph.replay()
        self.cache.columns += 1
        self.read = [read + 1 for read in self.read]
        return logits

    def _graph(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph for the next token, and where it leaves its logits."""
        begins = chunk_begins(self.model.config, self.read)
        if begins not in self.graphs:
            with known(self.read, memory_full(self.cache)):
                self.graphs[begins] = self._capture()
        return self.graphs[begins]

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step_in_place(self.model, self.token, self.cache.map(Tensor.clone))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step_in_place(self.model, self.token, self.cache)
        return graph, logits


def chunk_begins(config: BMojoConfig, read: list[int]) -> bool:
    """Whether the next token is the first of a chunk in one of the rows."""
    if "bmojo" not in config.layer_types:
        return False
    return any(r % chunk_length(config) == 0 for r in read)


def memory_full(cache: BMojoCache) -> bool:
    """Whether every memory token of every row is there; they then stay there."""
    states = [state.memory for state in cache.states if isinstance(state, BMojoState)]
    current = all(bool(state.current.valid.all()) for state in states)
    return current and all(bool((state.best.score > EMPTY).all()) for state in states)


@torch.no_grad()
def step_in_place(
    model: BMojoForCausalLM, token: Int[Tensor, "b 1"], cache: BMojoCache
) -> Float[Tensor, "b v"]:
    """Logits (b, v) after one token, the new state written into the tensors of ``cache``.

    ``cache.columns`` is the host's count and stays as it was.
    """
    places = list(cache.tensors())
    moving = BMojoCache(cache.states, cache.position, cache.columns)
    logits = model(token, past_key_values=moving, use_cache=True).logits[:, -1]
    held = {place.untyped_storage().data_ptr() for place in places}
    changed = [
        # a view of another place must be read before that place is written
        (place, new.clone() if new.untyped_storage().data_ptr() in held else new)
        for place, new in zip(places, moving.tensors(), strict=True)
        if new is not place
    ]
    for place, new in changed:
        place.copy_(new)
    return logits
