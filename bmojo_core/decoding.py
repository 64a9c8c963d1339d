"""Decoding without the cost of launching: one step recorded as a CUDA graph and replayed.

    graph = DecodeGraph(model, cache)        # a copy of the state, in tensors that never move
    logits = graph(token)                    # (b, 1) -> (b, 1, vocab_size)

A step of a B'MOJO reads a state of constant size and returns one of the same size, so its kernels
can be recorded once and run again on the same addresses:

    new, logits = model(token, state);   state <- new                  all of it in the graph

On a CPU there are no graphs; the same step then runs as it is, on the same tensors.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bmojo_core.cache import BMojoCache
from bmojo_core.modeling import BMojoForCausalLM

WARM_UP = 3  # steps before recording: kernels are compiled, libraries choose their algorithms


class DecodeGraph:
    """One decoding step of a model, recorded from a state on.

    Parameters
    ----------
    model : BMojoForCausalLM
        In evaluation mode, without full ``attention`` sublayers: their state grows.
    cache : BMojoCache
        Where to go on from. It is copied and stays as it is.

    Attributes
    ----------
    cache : BMojoCache
        The state after the last call. The next call overwrites its tensors: ``fork`` does not
        protect a copy from that, ``map(torch.clone)`` does.

    Raises
    ------
    ValueError
        If the model is in training mode, has a state that grows, or the cache is empty or another
        model's.

    Notes
    -----
    What depends on where the tensors lie is fixed: weights may change in place (a training step),
    but not be replaced (``model.to``). Rows may begin at different positions.
    """

    def __init__(self, model: BMojoForCausalLM, cache: BMojoCache) -> None:
        if model.training:
            raise ValueError("model must be in evaluation mode, got one in training mode")
        if "attention" in model.config.layer_types:
            raise ValueError(
                "model must have a state of constant size, got full attention among its sublayers "
                f"{model.config.layer_types}"
            )
        if cache.is_empty():
            raise ValueError("cache must have read at least one token, got an empty one")
        cache.check(cache.position.shape[0], len(model.config.layer_types))
        self.model = model
        self.cache = _copy(cache)
        device = cache.position.device
        self._token = torch.zeros(cache.position.shape[0], 1, dtype=torch.long, device=device)
        self._graph = self._logits = None
        if device.type == "cuda":
            self._record()

    @torch.no_grad()
    def __call__(self, token: Int[Tensor, "b 1"]) -> Float[Tensor, "b 1 v"]:
        """Logits after one more token of every row.

        Parameters
        ----------
        token : (b, 1)
            Ids, on any device. From the model's own device nothing waits for anything.

        Returns
        -------
        (b, 1, vocab_size)
            With a CUDA graph the next call overwrites them.

        Raises
        ------
        ValueError
            If the shape is another.
        """
        if token.shape != self._token.shape:
            raise ValueError(f"token must be {tuple(self._token.shape)}, got {tuple(token.shape)}")
        self._token.copy_(token)
        if self._graph is None:
            logits = _step(self.model, self._token, self.cache)
        else:
            self._graph.replay()
            logits = self._logits
        self.cache.columns += 1
        return logits

    @torch.no_grad()
    def _record(self) -> None:
        rehearsal = _copy(self.cache)  # a step writes in place
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                _step(self.model, self._token, rehearsal)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = _step(self.model, self._token, self.cache)


def _copy(cache: BMojoCache) -> BMojoCache:
    return cache.map(lambda t: t.detach().clone(memory_format=torch.contiguous_format))


def _step(
    model: BMojoForCausalLM, token: Int[Tensor, "b 1"], cache: BMojoCache
) -> Float[Tensor, "b 1 v"]:
    """Read one token and put the new state where the old one is."""
    after = BMojoCache(cache.states, cache.position, cache.columns)
    logits = model(token, past_key_values=after, use_cache=True).logits
    for old, new in zip(cache.tensors(), after.tensors(), strict=True):
        if new is not old:  # some are written in place
            old.copy_(new)
    return logits
