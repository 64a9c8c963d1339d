"""Measures of trained models."""

from bmojo_core.evaluation.accuracy import accuracy_per_example, answers, recall_accuracy
from bmojo_core.evaluation.positions import PositionLoss, doubling_edges, perplexity_by_position

__all__ = [
    "PositionLoss",
    "accuracy_per_example",
    "answers",
    "doubling_edges",
    "perplexity_by_position",
    "recall_accuracy",
]
