"""Tasks whose answers are known: generators of (input_ids, labels).

A label stands in the column that must say it, -100 where nothing is asked, which is how
``training.scored_loss`` and ``training.train`` read it.  ``model(ids, labels=..)`` is no loss for
these: it shifts its labels, as all transformers models do.
"""

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
