"""Looking inside: what a model remembered, and why."""

from bmojo_core.inspect.trace import LayerTrace, memory_trace

__all__ = ["LayerTrace", "memory_trace"]
