"""B'MOJO: sequence models with fading and eidetic memory (arXiv 2407.06324).

``BMojoConfig`` names one of five kinds of model, ``BMojoForCausalLM`` is the model.  Importing this
package makes both known to transformers' Auto classes; the models themselves are imported when the
first of them, or the first configuration, is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from bmojo_core.config import BMojoConfig

if TYPE_CHECKING:
    from bmojo_core.cache import BMojoCache
    from bmojo_core.decode_graph import DecodeGraph
    from bmojo_core.modeling import BMojoForCausalLM, BMojoModel

AutoConfig.register("bmojo", BMojoConfig, exist_ok=True)

__version__ = "0.1.0"
__all__ = ["BMojoCache", "BMojoConfig", "BMojoForCausalLM", "BMojoModel", "DecodeGraph"]

_HOME = {
    "BMojoCache": "cache", "BMojoForCausalLM": "modeling", "BMojoModel": "modeling",
    "DecodeGraph": "decode_graph",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a model class on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
