"""Tasks whose answers are known: generators of (input_ids, labels)."""

from bmojo_core.tasks.mqar import mqar

__all__ = ["mqar"]
