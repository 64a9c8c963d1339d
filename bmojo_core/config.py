"""One configuration for five kinds of sequence model.

A model is a stack of residual sublayers ``h <- h + f(norm(h))``; ``layer_types`` lists them.

=====================  ==========================================================================
sublayer               f
=====================  ==========================================================================
``mamba``              selective state-space model: fading memory (section 3.1, appendix E);
                       ``fading`` says whether channels or whole heads have their own decay
``attention``          full causal attention: eidetic memory of everything
``sliding_attention``  causal attention over the last ``window`` inputs
``bmojo``              an SSM, and attention over window, fading and eidetic tokens (Algorithm 1)
``feedforward``        gated MLP;  ``moe`` is its mixture-of-experts form
=====================  ==========================================================================

One block of each kind has the same number of parameters (within 3 %), because the free width of
the kind is solved for: the MLP's of the Transformer, the SSM's of the Mamba stack.

    transformer = attention + feedforward      mamba = mamba + mamba      hybrid = mamba +
    sliding_attention      bmojo_f = bmojo without eidetic tokens      bmojo = bmojo

The paper leaves much of the block open (which wiring, what is normalised, which outputs become
fading tokens, how many).  Every such choice is a field here, with what the paper says beside it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import numbers
from typing import Any

from transformers import PretrainedConfig

KINDS = ("transformer", "mamba", "hybrid", "bmojo_f", "bmojo")
SUBLAYERS = ("mamba", "attention", "sliding_attention", "bmojo", "feedforward", "moe")

# Blocks of 10.6 d^2 parameters (an SSM of 6.6 d^2, an attention of 4 d^2) and tied embeddings.
# Up to 30m the vocabulary is bytes; from 130m it is the paper's tokenizer's size.
PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "window": 32},
    "10m": {"vocab_size": 256, "hidden_size": 320, "num_layers": 9, "num_heads": 5, "window": 128},
    "30m": {"vocab_size": 256, "hidden_size": 512, "num_layers": 11, "num_heads": 8, "window": 256},
    "130m": {"vocab_size": 32000, "hidden_size": 768, "num_layers": 17, "num_heads": 12},
    "370m": {"vocab_size": 32000, "hidden_size": 1024, "num_layers": 30, "num_heads": 16},
    "790m": {"vocab_size": 32000, "hidden_size": 1536, "num_layers": 30, "num_heads": 16},
    "1.4b": {"vocab_size": 32000, "hidden_size": 2048, "num_layers": 30, "num_heads": 16},
    "3b": {"vocab_size": 32000, "hidden_size": 2560, "num_layers": 42, "num_heads": 20},
}


class BMojoConfig(PretrainedConfig):
    """Sizes and choices of a model; the same names for all five kinds.

    Parameters
    ----------
    vocab_size, hidden_size, num_layers
        Tokens, model width d, number of blocks (``layer_types`` lists the sublayers of all blocks).
    window
        w, the inputs a query sees, its own included (sections 3.2 and B.2).
    num_fading_tokens
        m_f, SSM outputs shown to attention as tokens.  The paper does not give its value.
    num_eidetic_tokens
        m_e, the bound on the eidetic memory; 0 makes B'MOJO-F.
    innovation_taps
        k, how many past outputs the fixed predictor averages (the paper's short convolution has 4).
    wiring
        ``"stacked"``: the SSM's output joins the residual stream and attention reads the stream
        after it.  ``"parallel"``: Algorithm 1 to the letter, the SSM reaches the output only
        through its fading tokens and through what it selects.  Open in the paper.
    memory_update
        ``"chunk"``: memory is fixed while a chunk is read (appendix B.2, the training form).
        ``"token"``: memory is updated before every query (Algorithm 1).
    memory_chunk
        Length of a chunk; None means the window, as in appendix B.2.
    selection
        Which tokens become eidetic: a name in ``bmojo_core.layers.selection.POLICIES``.
        ``learned_predictor`` recalled somewhat more at equal bytes, within the spread of seeds
        (results/policies.json, chapter 11).
    selection_seed
        Seed of the ``"random"`` policy.
    normalize_fading
        RMS-normalise an SSM output before it is projected to a key and a value.  Open in the paper.
    fading_stride
        Spacing of the m_f outputs, counted back from the chunk's start.  Open in the paper.
    normalize_innovation
        RMS-normalise outputs before the prediction error is taken.  Open in the paper.
    memory_projections
        ``"shared"``: memory tokens use the window's key and value projections; ``"separate"``:
        fading and eidetic tokens have their own.  Open in the paper.
    memory_gates
        Learned gates, zero at first, on what the SSM adds to the stream (one a channel) and on
        what memory changes in attention (one a head): for memory added to a trained model.
    store_in_window
        Whether a token still inside the window may already sit in memory.  Open in the paper.
    key_kernel
        Length of a short causal convolution on what attention's keys and values read, initialised
        to the identity; 0 for none (the paper's attention has none).
    fading
        How the SSM's state decays, a name in ``bmojo_core.layers.mamba.FADINGS``.
        ``"selective"``: each channel and state by itself, which is the paper's fading memory
        (Mamba's selective scan).  ``"scalar_decay"``: all states of a head alike, as in Mamba-2,
        so that matrix units can compute the scan.  The latter is not in the paper; a training step
        takes longer with it (results/throughput_32k_scalar.json, chapter 30), and what it is worth
        in quality has not been measured.
    ssm_head_dim
        Channels of a head of ``"scalar_decay"``; None is the largest divisor of the inner width
        that is at most 64.
    state_size, conv_kernel, expand, dt_rank
        The SSM: n states a channel (None is 16, and 64 for ``"scalar_decay"``), convolution taps,
        inner width / d, rank of delta's projection.
    ssm_intermediate_size
        Inner width of the SSM; overrides ``expand``.
    ssm_norms
        ``None``; ``"learned"`` normalises delta, B and C with weights (Jamba); ``"plain"`` without
        (FalconMamba).
    ssm_norm_eps
        The constant in those norms; None means ``norm_eps``.
    num_heads, num_kv_heads, head_dim
        Attention's heads, its key-value heads (grouped-query when fewer), width of a head.
    intermediate_size
        Width of the MLP; None solves for the parameter count of a B'MOJO block.
    num_experts, num_experts_per_tok
        Mixture of experts, in ``moe`` sublayers only.
    position, rope_parameters
        ``"none"`` (the paper's B'MOJO) or ``"rope"``, with transformers' dictionary of parameters.
    layer_types
        The residual sublayers, in order; None means ``("bmojo",) * num_layers``.

    Raises
    ------
    ValueError
        For an unknown key or a value out of range; the message names the argument.
    """

    model_type = "bmojo"
    keys_to_ignore_at_inference = ("past_key_values", "cache")
    attribute_map = {  # noqa: RUF012  (transformers reads this class attribute)
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
    }

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        num_layers: int = 2,
        window: int = 512,
        num_fading_tokens: int = 8,
        num_eidetic_tokens: int = 64,
        innovation_taps: int = 4,
        wiring: str = "stacked",
        memory_update: str = "chunk",
        memory_chunk: int | None = None,
        selection: str = "innovation",
        selection_seed: int = 0,
        normalize_fading: bool = True,
        fading_stride: int = 1,
        normalize_innovation: bool = False,
        memory_projections: str = "shared",
        memory_gates: bool = False,
        store_in_window: bool = True,
        key_kernel: int = 0,
        fading: str = "selective",
        ssm_head_dim: int | None = None,
        state_size: int | None = None,
        conv_kernel: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        ssm_intermediate_size: int | None = None,
        ssm_norms: str | None = None,
        ssm_norm_eps: float | None = None,
        ssm_bias: bool = False,
        conv_bias: bool = True,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        attention_bias: bool = False,
        attention_output_bias: bool = False,
        intermediate_size: int | None = None,
        mlp_bias: bool = False,
        hidden_act: str = "silu",
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        position: str = "none",
        rope_parameters: dict[str, Any] | None = None,
        max_position_embeddings: int = 1 << 20,
        layer_types: list[str] | tuple[str, ...] | None = None,
        norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(kwargs)
        own = {k: v for k, v in locals().items() if k in _FIELDS}
        super().__init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, value)
        self.num_kv_heads = num_kv_heads if num_kv_heads is not None else num_heads
        if state_size is None:
            self.state_size = 64 if fading == "scalar_decay" else 16
        _check(self)
        self.layer_types = list(layer_types or ("bmojo",) * num_layers)
        self.head_dim = head_dim if head_dim is not None else hidden_size // num_heads
        self.ssm_norm_eps = ssm_norm_eps if ssm_norm_eps is not None else norm_eps
        self.memory_chunk = memory_chunk if memory_chunk is not None else window
        self.dt_rank = dt_rank if dt_rank is not None else math.ceil(hidden_size / 16)
        self.ssm_intermediate_size = ssm_intermediate_size or int(expand * hidden_size)
        self.ssm_head_dim = ssm_head_dim or _divisor(self.ssm_intermediate_size, at_most=64)
        self.intermediate_size = intermediate_size or _matching_width(self, "feedforward")
        _check_derived(self)
        # transformers finds a model's class by its configuration: whoever has one has the other.
        importlib.import_module("bmojo_core.modeling")

    # -- the five kinds -------------------------------------------------------------------------

    @classmethod
    def transformer(cls, **sizes: Any) -> BMojoConfig:
        """Attention and MLP blocks; attention sees a window if ``window`` is given, else all."""
        if sizes.get("window") is not None:
            return cls._stack(("sliding_attention", "feedforward"), sizes)
        sizes = {**sizes, "window": cls._default("window")}
        return cls._stack(("attention", "feedforward"), sizes)

    @classmethod
    def mamba(cls, **sizes: Any) -> BMojoConfig:
        """Two selective state-space layers a block, as wide as the parameter count allows."""
        probe = cls(**{**sizes, "layer_types": None})
        heads_of = sizes.get("ssm_head_dim") if probe.fading == "scalar_decay" else None
        width = sizes.get("ssm_intermediate_size") or _matching_width(probe, "mamba", heads_of)
        return cls._stack(("mamba", "mamba"), {**sizes, "ssm_intermediate_size": width})

    @classmethod
    def hybrid(cls, **sizes: Any) -> BMojoConfig:
        """A selective state-space layer, then sliding-window attention (the stacked hybrid)."""
        return cls._stack(("mamba", "sliding_attention"), sizes)

    @classmethod
    def bmojo_f(cls, **sizes: Any) -> BMojoConfig:
        """B'MOJO with fading memory only: Algorithm 1 without its steps 3 and 4."""
        return cls._stack(("bmojo",), {**sizes, "num_eidetic_tokens": 0})

    @classmethod
    def bmojo(cls, **sizes: Any) -> BMojoConfig:
        """B'MOJO: window, fading tokens, and an eidetic memory selected by innovation."""
        return cls._stack(("bmojo",), sizes)

    @classmethod
    def preset(cls, name: str, kind: str = "bmojo", **changes: Any) -> BMojoConfig:
        """A named size of one of the five kinds; ``changes`` override its fields.

        Raises
        ------
        ValueError
            For a name not in ``PRESETS`` or a kind not in ``KINDS``.
        """
        if name not in PRESETS:
            raise ValueError(f"preset name must be one of {sorted(PRESETS)}, got {name!r}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        sizes = {**PRESETS[name], **changes}
        if kind == "transformer" and "window" not in changes:
            sizes.pop("window", None)  # the paper's Transformer attends to its whole context
        return getattr(cls, kind)(**sizes)

    @classmethod
    def _stack(cls, block: tuple[str, ...], sizes: dict[str, Any]) -> BMojoConfig:
        depth = sizes.get("num_layers", cls._default("num_layers"))
        return cls(**{**sizes, "layer_types": sizes.get("layer_types") or list(block) * depth})

    @classmethod
    def _default(cls, field: str) -> Any:
        return inspect.signature(cls.__init__).parameters[field].default

    @property
    def kind(self) -> str:
        """Which of ``KINDS`` the stack is, or ``"custom"``."""
        types = set(self.layer_types)
        if types == {"bmojo"}:
            return "bmojo" if self.num_eidetic_tokens else "bmojo_f"
        named = {
            frozenset({"attention", "feedforward"}): "transformer",
            frozenset({"sliding_attention", "feedforward"}): "transformer",
            frozenset({"mamba"}): "mamba",
            frozenset({"mamba", "sliding_attention"}): "hybrid",
        }
        return named.get(frozenset(types), "custom")

    @property
    def parameter_count(self) -> int:
        """Number of parameters of the causal language model, computed from the sizes alone."""
        body = sum(sublayer_parameters(self, t) for t in self.layer_types) + self.hidden_size
        tables = 1 if self.tie_word_embeddings else 2
        return body + tables * self.vocab_size * self.hidden_size

    def validate(self) -> None:
        """Check all fields; transformers calls it before it saves.

        It takes the place of transformers' own check, whose list of sublayers has no B'MOJO.
        """
        _check(self)
        _check_derived(self)


def sublayer_parameters(config: BMojoConfig, sublayer: str, width: int | None = None) -> int:
    """Parameters of one residual sublayer with its norm; ``width`` overrides its inner width."""
    d, bias = config.hidden_size, int
    heads, groups = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kv = 2 * groups * (d + bias(config.attention_bias))
    attention = heads * (d + bias(config.attention_bias)) + kv
    attention += d * (heads + bias(config.attention_output_bias)) + d
    if sublayer in ("attention", "sliding_attention"):
        return attention
    if sublayer in ("feedforward", "moe"):
        f = width or config.intermediate_size
        mlp = 3 * d * f + bias(config.mlp_bias) * (2 * f + d)
        experts = config.num_experts
        return d + (mlp if sublayer == "feedforward" else experts * (mlp + d))
    n, k, r = config.state_size, config.conv_kernel, config.dt_rank
    e = width or config.ssm_intermediate_size
    per_channel = 3 * d + k + (r + 2 * n) + 1
    ssm = e * (per_channel + bias(config.conv_bias)) + bias(config.ssm_bias) * (2 * e + d) + d
    ssm += _decay_parameters(config, e)
    ssm += (r + 2 * n) * bias(config.ssm_norms == "learned")
    if sublayer == "mamba":
        return ssm
    fading_norm = d * bias(config.normalize_fading and config.num_fading_tokens > 0)
    separate = kv * bias(config.memory_projections == "separate")
    memory = bias(config.num_fading_tokens + config.num_eidetic_tokens > 0)
    parallel = d * bias(config.wiring == "parallel")  # one norm feeds both halves
    convolution = d * config.key_kernel
    gates = memory * config.num_heads + d * bias(config.wiring == "stacked")
    gates *= bias(config.memory_gates)
    predictor = d * config.innovation_taps * bias(_has_predictor(config))
    return (
        ssm + attention + fading_norm + memory * separate - parallel + convolution + gates
        + predictor
    )  # fmt: skip


def _decay_parameters(config: BMojoConfig, width: int) -> int:
    """Those of delta's projection and of A, which have a row a channel or a head."""
    if config.fading == "scalar_decay":
        heads = width // config.ssm_head_dim
        return heads * (config.dt_rank + 1) + heads
    return width * (config.dt_rank + 1) + width * config.state_size


def _has_predictor(config: BMojoConfig) -> bool:
    from bmojo_core.layers.selection import asks_for

    return config.num_eidetic_tokens > 0 and asks_for(config.selection, "predictor")


def _matching_width(config: BMojoConfig, sublayer: str, multiple: int | None = None) -> int:
    """Inner width that gives a Transformer's or a Mamba's block the size of a hybrid's block.

    A multiple of what is given, or of a power of two that fits the width.
    """
    target = sublayer_parameters(config, "mamba", _base_width(config))
    target += sublayer_parameters(config, "attention")
    if sublayer == "feedforward":
        target -= sublayer_parameters(config, "attention")
    else:
        target = target / 2
    at_0, at_64 = (sublayer_parameters(config, sublayer, w) for w in (64, 128))
    width = 64 + (target - at_0) * 64 / (at_64 - at_0)
    if multiple is None:
        multiple = 4 if width < 256 else 16
        if sublayer == "mamba" and config.fading == "scalar_decay" and width >= 1024:
            multiple = 64  # whole heads of 64
    return max(multiple, round(width / multiple) * multiple)


def _base_width(config: BMojoConfig) -> int:
    return int(config.expand * config.hidden_size)


def _divisor(width: int, at_most: int) -> int:
    """The largest divisor of ``width`` that is at most ``at_most``."""
    return next(k for k in range(min(width, at_most), 0, -1) if width % k == 0)


_FIELDS = frozenset(inspect.signature(BMojoConfig.__init__).parameters) - {"self", "kwargs"}


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    base = set(PretrainedConfig().to_dict()) | {
        "name_or_path", "_name_or_path", "_commit_hash", "torch_dtype", "output_attentions",
        "attn_implementation", "model_type", "num_labels", "auto_map",
    }  # fmt: skip
    private = {k for k in kwargs if k.startswith("_")}
    for key in set(kwargs) - base - private:
        near = difflib.get_close_matches(key, _FIELDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown configuration key {key!r}{hint}")


def _check(c: BMojoConfig) -> None:
    positive = ("vocab_size", "hidden_size", "num_layers", "window", "innovation_taps")
    positive += ("fading_stride", "state_size", "conv_kernel", "num_heads", "num_kv_heads")
    positive += ("max_position_embeddings",)
    for name in positive:
        _require_int(c, name, at_least=1)
    for name in ("num_fading_tokens", "num_eidetic_tokens", "num_experts", "key_kernel"):
        _require_int(c, name, at_least=0)
    for name in ("num_experts_per_tok", "selection_seed"):
        _require_int(c, name, at_least=0)
    optional = ("memory_chunk", "dt_rank", "ssm_intermediate_size", "intermediate_size", "head_dim")
    optional += ("ssm_head_dim",)
    for name in optional:
        if getattr(c, name) is not None:
            _require_int(c, name, at_least=1)
    _require_choice(c, "wiring", ("stacked", "parallel"))
    _require_choice(c, "memory_update", ("chunk", "token"))
    _require_choice(c, "memory_projections", ("shared", "separate"))
    _require_choice(c, "position", ("none", "rope"))
    _require_choice(c, "ssm_norms", (None, "learned", "plain"))
    _require_choice(c, "fading", ("selective", "scalar_decay"))
    from transformers.activations import ACT2FN  # here: it costs a second of import

    _require_choice(c, "hidden_act", tuple(sorted(ACT2FN)))
    types = ("bmojo",) if c.layer_types is None else c.layer_types
    listed = isinstance(types, (list, tuple)) and len(types) > 0
    if not (listed and all(t in SUBLAYERS for t in types)):
        raise ValueError(f"layer_types must be a list of entries of {SUBLAYERS}, got {types!r}")
    if c.head_dim is None and c.hidden_size % c.num_heads:
        raise ValueError(
            f"num_heads must divide hidden_size {c.hidden_size} when head_dim is not given, "
            f"got {c.num_heads}"
        )
    if c.num_heads % c.num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads {c.num_heads}, got {c.num_kv_heads}")
    if not (_is_finite(c.expand) and c.expand * c.hidden_size >= 1):
        raise ValueError(f"expand must be finite and at least 1 / hidden_size, got {c.expand!r}")
    for name in ("norm_eps", "ssm_norm_eps", "initializer_range"):
        value = getattr(c, name)
        if value is not None and not (_is_finite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    if not isinstance(c.rope_parameters, dict | None):
        raise ValueError(f"rope_parameters must be a dictionary or None, got {c.rope_parameters!r}")


def _check_derived(c: BMojoConfig) -> None:
    from bmojo_core.layers.selection import POLICIES

    _require_choice(c, "selection", tuple(sorted(POLICIES)))
    if "moe" in c.layer_types and not 1 <= c.num_experts_per_tok <= c.num_experts:
        raise ValueError(
            f"num_experts_per_tok must be in 1..num_experts ({c.num_experts}) when layer_types "
            f"has 'moe', got {c.num_experts_per_tok}"
        )
    if c.fading == "scalar_decay" and c.ssm_intermediate_size % c.ssm_head_dim:
        raise ValueError(
            f"ssm_head_dim must divide the SSM's inner width {c.ssm_intermediate_size} for "
            f"fading='scalar_decay', got {c.ssm_head_dim}"
        )
    if c.position == "rope" and c.head_dim % 2:
        raise ValueError(f"head_dim must be even for position='rope', got {c.head_dim}")


def _is_finite(value: object) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _require_int(c: BMojoConfig, name: str, at_least: int) -> None:
    value = getattr(c, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {value!r}")


def _require_choice(c: BMojoConfig, name: str, allowed: tuple) -> None:
    if getattr(c, name) not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {getattr(c, name)!r}")
