"""One decode step as a CUDA graph: a new token costs one launch.

    logits = graph(token)        the cache has moved on by one token, in its own tensors

A step is many short kernels, and a host launches them more slowly than a GPU runs them.  Two things
are done about it.  torch.compile fuses what stands between two products with weights, once for each
kind of sublayer; and all that is left, captured once, is replayed by a single call.  That works
because the state has one size at any length and the step asks the device nothing: what depends on
the position is decided by tensors, or by the host's own count of tokens.  By that count there are
two graphs: one for a token that begins a chunk in some row, with the memory of the new chunk, and a
shorter one for all others.

Symbols: b batch, v vocabulary, d model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bmojo_core.cache import BMojoCache, leaves
from bmojo_core.config import BMojoConfig
from bmojo_core.layers.bmojo import BMojoState
from bmojo_core.layers.eidetic import EMPTY, chunk_length
from bmojo_core.layers.rotary import check_length
from bmojo_core.layers.rows import Known, known, told
from bmojo_core.modeling import BMojoForCausalLM

WARM_UPS = 3  # kernels are compiled and workspaces made before the capture
VARIANTS = 64  # of one traced function: kinds of sublayers, batch sizes, what is known
Sublayer = Callable[[nn.Module, Tensor, Any, Tensor, Known | None], Tensor]


class DecodeGraph:
    """The decode step of ``model`` for the batch whose state is ``cache``.

    Making one takes up to a minute, most of it torch.compile, which keeps what it has made on disk
    for the next time.

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
        self.sublayer = fused(alone=len(self.read) == 1)
        now = what_is_known(model.config, cache, self.read)
        self.graphs = {
            begins: self._capture(now._replace(chunk_begins=begins))
            for begins in {chunk_begins(model.config, [read]) for read in (0, 1)}
        }

    def __call__(self, token: Int[Tensor, "b 1"]) -> Float[Tensor, "b v"]:
        """Logits of the next token; overwritten by the next call.

        Raises
        ------
        ValueError
            For a text longer than "dynamic" rotary positions reach.
        """
        if self.model.model.longest_text is not None:
            check_length(self.model.model.longest_text, None, max(self.read) + 1)
        self.token.copy_(token)
        graph, logits = self.graphs[chunk_begins(self.model.config, self.read)]
        graph.replay()
        self.cache.columns += 1
        self.read = [read + 1 for read in self.read]
        return logits

    @torch.no_grad()
    def _capture(self, what: Known) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step's graph, and where it leaves its logits."""
        with (
            torch.cuda.device(self.token.device),  # streams and launches go where the model is
            known(what),
            torch._dynamo.config.patch(recompile_limit=VARIANTS),
        ):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    copy = self.cache.map(Tensor.clone)
                    step_in_place(self.model, self.token, copy, self.sublayer)
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):  # its own default is one device's
                logits = step_in_place(self.model, self.token, self.cache, self.sublayer)
        return graph, logits


def what_is_known(config: BMojoConfig, cache: BMojoCache, read: list[int]) -> Known:
    """What the host may rely on for all tokens to come, and whether the next begins a chunk."""
    window_full = all(r >= config.window - 1 for r in read)
    return Known(chunk_begins(config, read), window_full, memory_full(cache))


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


def sublayer_in_place(
    layer: nn.Module, h: Float[Tensor, "b 1 d"], state: Any, start: Int[Tensor, "b"],
    what: Known | None,
) -> Float[Tensor, "b 1 d"]:  # fmt: skip
    """The stream after one sublayer, its new state written into the tensors of ``state``.

    ``what`` is known of the rows. It comes as an argument because not every torch reads a thread's
    own variables when it traces: 2.11 takes them for what they are in a new thread.
    """
    with known(what):
        h, new = layer(h, state, start, None, True)
    for (_, place), (_, moved) in [*zip(leaves("", state), leaves("", new), strict=True)]:
        if moved is not place:
            place.copy_(moved)
    return h


def fused(alone: bool) -> Sublayer:
    """The same, compiled: a few kernels between one product with weights and the next.

    For a single row (``alone``) a product is a sum that is fused as well, its tiles are tried out,
    and what does not depend on each other shares a kernel; that takes most of a minute once.
    """
    options = {"coordinate_descent_tuning": True, "combo_kernels": True} if alone else {}
    return torch.compile(sublayer_in_place, fullgraph=True, dynamic=False, options=options)


@torch.no_grad()
def step_in_place(
    model: BMojoForCausalLM,
    token: Int[Tensor, "b 1"],
    cache: BMojoCache,
    sublayer: Sublayer = sublayer_in_place,
) -> Float[Tensor, "b v"]:
    """Logits (b, v) after one token, the new state written into the tensors of ``cache``.

    ``cache.columns`` is the host's count and stays as it was.
    """
    h = model.model.embed_tokens(token)
    for layer, state in zip(model.model.layers, cache.states, strict=True):
        h = sublayer(layer, h, state, cache.position, told())
    cache.position += 1
    return model.lm_head(model.model.norm(h))[:, -1]
