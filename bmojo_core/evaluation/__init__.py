"""Measures of trained models."""

from bmojo_core.evaluation.accuracy import accuracy_per_example, answers, recall_accuracy

__all__ = ["accuracy_per_example", "answers", "recall_accuracy"]
