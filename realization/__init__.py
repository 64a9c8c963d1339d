"""Stochastic realization theory for linear systems in discrete time (numpy and scipy only)."""

from realization.systems import StateSpace, feedback, parallel, series

__all__ = [
    "StateSpace",
    "feedback",
    "parallel",
    "series",
]
