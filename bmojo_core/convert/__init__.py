"""Transformers, Mamba and Jamba as B'MOJO: checkpoints converted, and given more memory.

    zero last row      the canonical form is a shift: attention over a window   Mistral, Llama
    no window          the diagonal part alone: a selective scan               Mamba, FalconMamba
    both, stacked      the hybrid                                              Jamba

``from_hf`` computes the same logits with the same weights; ``upgrade`` adds fading and eidetic
memory that at first changes nothing and can be learned.
"""

from bmojo_core.convert.families import FAMILIES, Family
from bmojo_core.convert.upgrade import upgrade
from bmojo_core.convert.weights import from_hf

__all__ = ["FAMILIES", "Family", "from_hf", "upgrade"]
