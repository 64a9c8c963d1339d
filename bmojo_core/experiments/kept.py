"""How many of the useful tokens a memory holds: the selection, seen apart from the accuracy.

    share = | M_last ∩ useful | / | useful |         mean over sequences, for every B'MOJO layer

M_last is what the layer's eidetic memory holds while the last chunk is read, when all tokens of
the sequence but that chunk's have competed for a place.
"""

from __future__ import annotations

import torch

from bmojo_core.experiments.recall_data import Examples
from bmojo_core.inspect import memory_trace
from bmojo_core.modeling import BMojoForCausalLM


@torch.no_grad()
def kept_shares(
    model: BMojoForCausalLM, examples: Examples, rows: int = 64
) -> dict[str, dict[str, float]]:
    """Share of values and of keys held, by sublayer.

    Parameters
    ----------
    model
        A model with eidetic tokens, in evaluation mode.
    examples
        Of MQAR: each useful token is a value, and its key stands one column before it.
    rows
        So many examples are read.
    """
    ids = examples.ids[:rows].long()
    values = examples.useful > 0
    keys = values.roll(-1)
    traces = memory_trace(model, ids, examples.useful.expand(len(ids), -1))
    shares = {}
    for trace in traces:
        held = torch.zeros(ids.shape, device=ids.device)
        held.scatter_add_(1, trace.position[:, -1], trace.valid[:, -1].float())
        shares[str(trace.layer)] = {
            name: round(float(held[:, columns].mean()), 4)
            for name, columns in (("values", values), ("keys", keys))
        }
    return shares
