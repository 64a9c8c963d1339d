"""One decode step as a CUDA graph: a new token costs one launch.

    logits = graph(token)        the cache has moved on by one token, in its own tensors

A step of a small model is a few hundred short kernels, and a host launches them more slowly than a
GPU runs them.  Captured once, they are replayed by a single call.  That works because the state has
one size at any length and the step asks the device nothing: what depends on the position is
decided by tensors.

The step computes new tensors for what it does not write in place; inside the graph they are copied
back to where the next replay reads.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bmojo_core.cache import BMojoCache
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
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step_in_place(model, self.token, cache.map(Tensor.clone))
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step_in_place(model, self.token, cache)

    def __call__(self, token: Int[Tensor, "b 1"]) -> Float[Tensor, "b v"]:
        """Logits of the next token; overwritten by the next call."""
        self.token.copy_(token)
        self.graph.replay()
        self.cache.columns += 1
        return self.logits


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
