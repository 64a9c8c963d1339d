"""More memory for a converted checkpoint, learned from where it is.

Every attention sublayer becomes a B'MOJO block (in a stack without attention, every SSM does):

    Mistral     h <- h + Attn(norm h)     ->    h <- h + a * SSM(norm' h)
                                                h <- h + o + g (o' - o)
    Mamba       h <- h + SSM(norm h)      ->    h <- h + SSM(norm h)
                                                h <- h + W_o Attn([F | M | window])

with o attention over the window and o' over [F | M | window].  At first a, g and W_o are 0, and
the block computes what it did.  Gradients at that point are those of a linear map at zero: of a,
<dL/dh, y>; of g, <dL/dout, o' - o>; of W_o, the usual outer product.  None vanishes, and after one
step everything behind them learns as well.
Two other ways do not work.  Memory tokens masked by a logit bias of -inf have no gradient.  An SSM
whose output projection is zero has no innovation either, so that nothing could be selected by it:
the gate stands behind y, not inside it.

Keys and values of memory tokens get projections of their own, which begin as copies of the
window's: they may change without harm to what the window does.

Symbols: a (d,) gate of the SSM, g (h,) gate of memory, F fading and M eidetic tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmojo_core.config import BMojoConfig
from bmojo_core.modeling import BMojoForCausalLM

ATTENTION = ("attention", "sliding_attention")
MEMORY_FIELDS = frozenset({
    "innovation_taps", "memory_update", "memory_chunk", "selection", "selection_seed",
    "normalize_fading", "fading_stride", "normalize_innovation", "memory_projections",
    "store_in_window",
})  # fmt: skip
SSM_FIELDS = frozenset({
    "fading", "ssm_head_dim", "state_size", "conv_kernel", "expand", "dt_rank",
    "ssm_intermediate_size", "ssm_norms", "ssm_norm_eps", "ssm_bias", "conv_bias",
})  # fmt: skip
ATTENTION_FIELDS = frozenset({
    "num_heads", "num_kv_heads", "head_dim", "attention_bias", "attention_output_bias", "position",
    "rope_parameters",
})  # fmt: skip


def upgrade(
    model: BMojoForCausalLM,
    num_fading_tokens: int = 1,
    num_eidetic_tokens: int = 64,
    *,
    window: int | None = None,
    seed: int = 0,
    **changes: Any,
) -> BMojoForCausalLM:
    """A copy of the model with fading and eidetic memory that at first changes nothing.

    The new model computes the same function on texts of any length when its attention had this
    window before (or it had no attention), and on texts up to ``window`` when it had none.

    Parameters
    ----------
    model
        A converted model; its weights are copied.
    num_fading_tokens, num_eidetic_tokens
        m_f and m_e of the new blocks.
    window
        w of blocks that replace full attention or stand beside SSMs; sliding attention keeps its.
    seed
        Of the new weights.
    changes
        Settings of the memory (``MEMORY_FIELDS``), and of what the model did not have before: of
        the SSM (``SSM_FIELDS``) or of attention (``ATTENTION_FIELDS``).

    Raises
    ------
    ValueError
        When the model is not a B'MOJO or has nothing to upgrade, a window is missing or would
        change, or for a setting that would change what the model already computes.
    """
    if not isinstance(model, BMojoForCausalLM):
        raise ValueError(
            f"model must be a BMojoForCausalLM, as from_hf returns it, got {type(model).__name__}"
        )
    types = model.config.layer_types
    if "bmojo" in types:
        raise ValueError("model must not have 'bmojo' sublayers yet")
    replaced = ATTENTION if set(types) & set(ATTENTION) else ("mamba",)
    places = {i: kind for i, kind in enumerate(types) if kind in replaced}
    if not places:
        raise ValueError(f"model must have attention or mamba sublayers, got {sorted(set(types))}")
    config = _configuration(model.config, replaced, window, changes)
    config.num_fading_tokens, config.num_eidetic_tokens = num_fading_tokens, num_eidetic_tokens
    config.validate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new = BMojoForCausalLM(config).to(model.dtype)
    weights = _known_weights(model, new, places)
    left_over = new.load_state_dict(weights, strict=False).unexpected_keys
    if left_over:
        raise ValueError(f"weights without a place in the upgraded model: {sorted(left_over)}")
    new.generation_config = model.generation_config
    return new.to(model.device).train(model.training)


def _configuration(
    old: BMojoConfig, replaced: tuple[str, ...], window: int | None, changes: dict[str, Any]
) -> BMojoConfig:
    types = old.layer_types
    allowed = MEMORY_FIELDS | (frozenset() if "mamba" in types else SSM_FIELDS)
    allowed |= frozenset() if replaced == ATTENTION else ATTENTION_FIELDS
    for name in sorted(set(changes) - allowed):
        raise ValueError(f"upgrade cannot change {name!r}; it takes {sorted(allowed)}")
    if "sliding_attention" in types and window not in (None, old.window):
        raise ValueError(f"window must stay {old.window}, which the model has, got {window}")
    if "sliding_attention" not in types and window is None:
        raise ValueError("window must be given for a model that has none")
    fields = old.to_dict()
    sizes = {"ssm_intermediate_size", "ssm_head_dim", "dt_rank", "head_dim"}
    if "fading" in changes:  # the other way to fade has its own number of states
        sizes.add("state_size")
    for derived in {"memory_chunk"} | (allowed & sizes):
        fields.pop(derived)
    if "num_heads" in changes:
        fields.pop("num_kv_heads")  # as many as heads, unless given
    added = {
        "window": old.window if window is None else window, "memory_gates": replaced == ATTENTION,
        "memory_projections": "separate", "store_in_window": False,
        "layer_types": ["bmojo" if kind in replaced else kind for kind in types],
    }  # fmt: skip
    return BMojoConfig.from_dict({**fields, **added, **changes})


def _known_weights(
    old: BMojoForCausalLM, new: BMojoForCausalLM, places: dict[int, str]
) -> dict[str, Tensor]:
    """What the new model knows from the old: its weights, copies of them, and zeros."""
    names = {}
    for i, kind in places.items():
        half = "ssm" if kind == "mamba" else "attention"
        names[f"model.layers.{i}.norm."] = f"model.layers.{i}.{half}_norm."
        names[f"model.layers.{i}.inner."] = f"model.layers.{i}.{half}."
    known = {_renamed(name, names): weight for name, weight in old.state_dict().items()}
    fresh = new.state_dict()
    for i, kind in places.items():
        block = f"model.layers.{i}."
        if kind == "mamba":
            closed = block + "attention.projections.o_proj."
            known |= {n: torch.zeros_like(fresh[n]) for n in fresh if n.startswith(closed)}
            known[block + "attention_norm.weight"] = known[block + "ssm_norm.weight"]
        else:
            known[block + "ssm_norm.weight"] = known[block + "attention_norm.weight"]
        for name in [n for n in fresh if n.startswith(block + "attention.memory_")]:
            original = name.replace("attention.memory_", "attention.projections.")
            if original in known:
                known[name] = known[original]
            elif original in fresh:
                known[name] = fresh[original]
    return known


def _renamed(name: str, names: dict[str, str]) -> str:
    for prefix, other in names.items():
        if name.startswith(prefix):
            return other + name[len(prefix) :]
    return name
