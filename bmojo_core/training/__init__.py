"""Training: the loop, where it runs, truncated backpropagation, checkpoints and records."""

from bmojo_core.training.bptt import truncated_backward
from bmojo_core.training.engine import Engine, launched, single
from bmojo_core.training.interruption import interruption
from bmojo_core.training.loop import Recipe, Run, scored_logits, scored_loss, train
from bmojo_core.training.optim import adamw, learning_rate, parameter_groups
from bmojo_core.training.record import provenance, write_json

__all__ = [
    "Engine", "Recipe", "Run", "adamw", "interruption", "launched", "learning_rate",
    "parameter_groups", "provenance", "scored_logits", "scored_loss", "single", "train",
    "truncated_backward", "write_json",
]  # fmt: skip
