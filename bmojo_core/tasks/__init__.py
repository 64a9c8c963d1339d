"""Tasks whose answers are known: generators of (input_ids, labels)."""

from bmojo_core.tasks.fuzzy_recall import fuzzy_recall
from bmojo_core.tasks.induction_heads import induction_heads
from bmojo_core.tasks.mqar import mqar
from bmojo_core.tasks.needle import NeedleExamples, needle, string_match_all
from bmojo_core.tasks.noisy_recall import noisy_recall
from bmojo_core.tasks.selective_copying import selective_copying

__all__ = [
    "NeedleExamples",
    "fuzzy_recall",
    "induction_heads",
    "mqar",
    "needle",
    "noisy_recall",
    "selective_copying",
    "string_match_all",
]
