"""The operations B'MOJO is made of, each a pure function of tensors.

One folder an operation: `reference.py` is the equation and runs anywhere, `cpu.py` and `gpu.py`
are fast and tested against it, `__init__.py` checks the arguments and picks one.
"""

from bmojo_core.ops.causal_conv import causal_conv1d
from bmojo_core.ops.innovation import innovation, running_top_k
from bmojo_core.ops.memory_attention import memory_attention
from bmojo_core.ops.scalar_scan import scalar_scan
from bmojo_core.ops.selective_scan import selective_scan

__all__ = [
    "causal_conv1d",
    "innovation",
    "memory_attention",
    "running_top_k",
    "scalar_scan",
    "selective_scan",
]
