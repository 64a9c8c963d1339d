"""Accuracy on tasks with known answers: the mean over examples of the share answered rightly."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bmojo_core.batches import IGNORED
from bmojo_core.modeling import BMojoForCausalLM


@torch.no_grad()
def answers(
    model: BMojoForCausalLM, input_ids: Int[Tensor, "N l"], batch_size: int = 256
) -> Int[Tensor, "N l"]:
    """The likeliest token at every column, as int64 on the CPU."""
    device = next(model.parameters()).device
    parts = [
        model(ids.to(device), use_cache=False).logits.argmax(-1).cpu()
        for ids in input_ids.split(batch_size)
    ]
    return torch.cat(parts)


def accuracy_per_example(
    model: BMojoForCausalLM,
    input_ids: Int[Tensor, "N l"],
    labels: Int[Tensor, "N l"],
    batch_size: int = 256,
) -> Float[Tensor, "N"]:
    """Share of each example's scored columns that are answered rightly (N,).

    Raises
    ------
    ValueError
        When an example has no scored column.
    """
    asked = labels != IGNORED
    if not bool(asked.any(1).all()):
        raise ValueError("labels must score at least one column of every example")
    right = (answers(model, input_ids, batch_size) == labels) & asked
    return right.sum(1).double() / asked.sum(1)


def recall_accuracy(
    model: BMojoForCausalLM,
    input_ids: Int[Tensor, "N l"],
    labels: Int[Tensor, "N l"],
    batch_size: int = 256,
) -> float:
    """Mean of `accuracy_per_example`: the metric of the associative-recall literature."""
    return float(accuracy_per_example(model, input_ids, labels, batch_size).mean())
