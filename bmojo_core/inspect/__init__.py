"""Looking inside: what a model remembered, and why."""

from bmojo_core.inspect.page import memory_page
from bmojo_core.inspect.pictures import attention_shares, text_heat, timeline
from bmojo_core.inspect.trace import LayerTrace, memory_trace

__all__ = ["LayerTrace", "attention_shares", "memory_page", "memory_trace", "text_heat", "timeline"]
