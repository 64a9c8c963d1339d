"""Training: the loop, its optimiser, checkpoints and records."""

from bmojo_core.training.loop import Recipe, Run, scored_logits, scored_loss, train
from bmojo_core.training.optim import adamw, learning_rate, parameter_groups
from bmojo_core.training.record import provenance, write_json

__all__ = [
    "Recipe", "Run", "adamw", "learning_rate", "parameter_groups", "provenance", "scored_logits",
    "scored_loss", "train", "write_json",
]  # fmt: skip
