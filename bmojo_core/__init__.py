"""B'MOJO: sequence models with fading and eidetic memory (arXiv 2407.06324).

``BMojoConfig`` names one of five kinds of model, ``BMojoForCausalLM`` is the model.  Importing this
package registers both with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bmojo_core.cache import BMojoCache
from bmojo_core.config import BMojoConfig
from bmojo_core.modeling import BMojoForCausalLM, BMojoModel

AutoConfig.register("bmojo", BMojoConfig, exist_ok=True)
AutoModel.register(BMojoConfig, BMojoModel, exist_ok=True)
AutoModelForCausalLM.register(BMojoConfig, BMojoForCausalLM, exist_ok=True)

__version__ = "0.1.0"
__all__ = ["BMojoCache", "BMojoConfig", "BMojoForCausalLM", "BMojoModel"]
