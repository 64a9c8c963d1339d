"""The stack: embedding, residual sublayers, norm, and a head tied to the embedding.

    h = E[ids];   h <- h + f_i(norm(h), state_i)  for every sublayer i;   logits = E norm(h)

One class serves the five kinds and follows transformers' conventions: ``save_pretrained``,
``from_pretrained``, ``generate``, ``labels`` shifted inside the model, ``past_key_values``.

Inside, every row is one document whose tokens begin in column 0: padding on either side and packed
documents are rearranged when a batch enters and when it leaves (``batches``), so no pad is read.
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from bmojo_core import batches
from bmojo_core.cache import BMojoCache
from bmojo_core.config import BMojoConfig
from bmojo_core.layers.attention import Attention
from bmojo_core.layers.bmojo import BMojo, MemoryAttention
from bmojo_core.layers.feedforward import GatedMLP, MixtureOfExperts
from bmojo_core.layers.mamba import Mamba
from bmojo_core.layers.rotary import Rotary, check_length, longest_text
from bmojo_core.ops.rms_norm import rms_norm

# transformers calls the state ``cache`` from 5.24 on (the old name stays readable there).
STATE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

# What transformers' collators and trainers hand over that is spelt nearly like ours.
OTHERS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k"})


@dataclass
class BMojoModelOutput(BaseModelOutputWithPast):
    """What the stack returns; ``scored`` (b, l) says which columns have a predecessor."""

    scored: Bool[Tensor, "b l"] | None = None
    __annotations__[STATE] = BMojoCache | None


@dataclass
class BMojoOutput(CausalLMOutputWithPast):
    """What the language model returns: loss, logits, state."""

    __annotations__ = {STATE: BMojoCache | None}


class Residual(nn.Module):
    """h + f(norm(h)) for a sublayer f of one kind."""

    def __init__(self, config: BMojoConfig, sublayer: str) -> None:
        super().__init__()
        self.kind = sublayer
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.inner = {
            "mamba": lambda: Mamba(config),
            "attention": lambda: Attention(config, None),
            "sliding_attention": lambda: Attention(config, config.window),
            "feedforward": lambda: GatedMLP(config),
            "moe": lambda: MixtureOfExperts(config),
        }[sublayer]()

    def forward(self, h, state, start, lengths, keep_state, memory_scores=None):
        u = rms_norm(h, self.norm)
        if self.kind in ("feedforward", "moe"):
            return h + self.inner(u), None
        if self.kind == "mamba":
            y, state = self.inner(u, state, lengths, keep_state)
        else:
            y, state = self.inner(u, state, start, lengths, keep_state)
        return h + y, state


class BMojoPreTrainedModel(PreTrainedModel):
    """Weights and how they begin."""

    config_class = BMojoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("BMojo", "Residual")
    _is_stateful = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        elif isinstance(module, nn.Conv1d):
            bound = module.weight.shape[-1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (BMojo, Mamba, MemoryAttention, Rotary)):
            module.reset_parameters()
        # Each sublayer adds to the stream: keep the sum's variance independent of depth.
        depth = max(1, len(self.config.layer_types)) ** 0.5
        for name in ("out_proj", "o_proj", "down_proj"):
            if isinstance(getattr(module, name, None), nn.Linear):
                init.normal_(getattr(module, name).weight, std=std / depth)


class BMojoModel(BMojoPreTrainedModel):
    """The stack without its head: token ids (b, l) to hidden states (b, l, d)."""

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            BMojo(config) if kind == "bmojo" else Residual(config, kind)
            for kind in config.layer_types
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.longest_text = longest_text(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of token embeddings (d,) each; transformers asks for it."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the table of token embeddings."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Int[Tensor, "b l"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: Float[Tensor, "b l d"] | None = None,
        use_cache: bool | None = None,
        memory_scores: Float[Tensor, "b l"] | None = None,
        position_ids: Int[Tensor, "#b l"] | None = None,
        cu_seqlens: Int[Tensor, "n"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: BMojoCache | None = None,
        **kwargs: Any,
    ) -> BMojoModelOutput | tuple:
        """Hidden states after the final norm.

        Parameters
        ----------
        input_ids, inputs_embeds
            Token ids (b, l), or their embeddings (b, l, d); exactly one of the two.
        attention_mask
            Nonzero at tokens (b, l), or (b, read + l) as transformers passes it; None: no padding.
        past_key_values, cache
            State to go on from, by either of its names; it is updated in place.
        use_cache
            Whether to return the state; defaults to the configuration's, and to False in training
            and for packed documents.
        memory_scores
            Scores (b, l) for ``selection="oracle"``.
        position_ids
            Positions (b, l) of the tokens in their documents: a 0 begins a new document.
        cu_seqlens
            Boundaries (n + 1,) of the documents in a batch of one row, instead of position_ids.
        output_hidden_states
            Whether to return the stream before every sublayer and after the final norm; defaults
            to the configuration's.
        return_dict
            False for a plain tuple of what there is; defaults to the configuration's.

        Raises
        ------
        ValueError
            For an empty batch or sequence, ids out of the vocabulary, wrong shapes or dtypes,
            values that are not finite, packed documents with a state.
        TypeError
            For a keyword that is nearly one of these.  Others are let pass, as in transformers,
            whose trainers and collators hand over more than a model reads.
        """
        _refuse_misspelt(kwargs)
        batches.check_tokens(self.config, input_ids, inputs_embeds)
        h = inputs_embeds if input_ids is None else self.embed_tokens(input_ids)
        batches.check_scores(memory_scores, h.shape[:2])
        given = _state(past_key_values, cache)
        cache = BMojoCache() if given is None else given
        cache.check(h.shape[0], self.config)
        rows = batches.find_rows(
            tuple(h.shape[:2]), attention_mask, position_ids, cu_seqlens, cache.position
        )
        packed = rows is not None and rows.packed
        if packed and (use_cache or given is not None):
            raise ValueError("packed documents have no common state: use_cache must be False")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not packed
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        columns, lengths = h.shape[1], None
        if rows is not None:
            h, lengths = rows.pack(h), rows.lengths
            memory_scores = None if memory_scores is None else rows.pack(memory_scores)
        if self.longest_text is not None:
            new = columns if lengths is None else lengths
            check_length(self.longest_text, cache.position, new)
        h, states, seen = self._run(h, cache, lengths, use_cache, memory_scores)
        h = rms_norm(h, self.norm)
        if not self.training:
            batches.check_output(h, self.named_parameters())
        if use_cache:
            cache.advance(states, columns, lengths, h)
        back = (lambda x: x) if rows is None else rows.unpack
        out = BMojoModelOutput(
            last_hidden_state=back(h),
            hidden_states=tuple(back(x) for x in (*seen, h)) if output_hidden_states else None,
            scored=None if rows is None else rows.scored,
            **{STATE: cache if use_cache else None},
        )
        return out if _as_dict(self.config, return_dict) else out.to_tuple()

    def _run(self, h, cache, lengths, use_cache, memory_scores):
        """Through the stack: (stream, new states, stream before every sublayer)."""
        if use_cache:
            cache.own()
        states = cache.states or [None] * len(self.layers)
        new_states, seen = [], []
        for layer, state in zip(self.layers, states, strict=True):
            arguments = (h, state, cache.position, lengths, use_cache, memory_scores)
            seen.append(h)
            if self.gradient_checkpointing and self.training:
                h, new = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                h, new = layer(*arguments)
            new_states.append(new)
        return h, new_states, seen


def _state(past_key_values: BMojoCache | None, cache: BMojoCache | None) -> BMojoCache | None:
    """The state under whichever name it was given."""
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ValueError("past_key_values and cache are two names of one state: give one of them")
    return cache if past_key_values is None else past_key_values


def _refuse_misspelt(kwargs: dict[str, Any]) -> None:
    """No silence about a mask that is called ``atention_mask``."""
    if not kwargs or torch.compiler.is_compiling():
        return
    known = inspect.signature(BMojoForCausalLM.forward).parameters
    for name in set(kwargs) - OTHERS:
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            raise TypeError(f"unknown keyword {name!r}; did you mean {close[0]!r}?")


def _as_dict(config: BMojoConfig, asked: bool | None) -> bool:
    return config.return_dict if asked is None else asked


class BMojoForCausalLM(BMojoPreTrainedModel, GenerationMixin):
    """The stack with a head: next-token logits (b, l, vocab_size)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__(config)
        self.model = BMojoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head, whose weight is the embedding table unless untied."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Int[Tensor, "b l"] | None = None,
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "b kept"] | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: Float[Tensor, "b l d"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, "k"] = 0,
        memory_scores: Float[Tensor, "b l"] | None = None,
        position_ids: Int[Tensor, "#b l"] | None = None,
        cu_seqlens: Int[Tensor, "n"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: BMojoCache | None = None,
        **kwargs: Any,
    ) -> BMojoOutput | tuple:
        """Logits, and the loss when ``labels`` are given.

        Parameters
        ----------
        labels
            The token of each column that is kept, -100 where not scored; the model shifts them, so
            that column t is predicted from columns before it (transformers' convention; labels of
            `bmojo_core.tasks` are not to be shifted: `training.scored_loss`).  Pads and
            tokens whose left neighbour is not in their document, or not kept, are never scored.
        logits_to_keep
            Compute logits of the last so many columns only, 0 for all; or indices of columns.

        Other parameters as in ``BMojoModel.forward``.
        """
        _refuse_misspelt(kwargs)
        out = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, memory_scores,
            position_ids, cu_seqlens, output_hidden_states, return_dict=True, cache=cache,
        )  # fmt: skip
        h = out.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, keep])
        loss = None
        if labels is not None:
            batches.check_labels(self.config, labels, logits.shape[:2])
            if out.scored is not None:
                labels = labels.masked_fill(~out.scored[:, keep], batches.IGNORED)
            if isinstance(keep, Tensor):
                labels = labels.masked_fill(batches.after_gap(keep), batches.IGNORED)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        said = BMojoOutput(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            **{STATE: getattr(out, STATE)},
        )
        return said if _as_dict(self.config, return_dict) else said.to_tuple()

    # -- generate() -----------------------------------------------------------------------------

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # our own constant-size cache

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, use_cache=True,
        inputs_embeds=None, logits_to_keep=0, cache=None, **kwargs,
    ):  # fmt: skip
        """The columns that the state has not read yet."""
        past_key_values = _state(past_key_values, cache)
        if use_cache and past_key_values is None:
            past_key_values = BMojoCache()
        inputs = dict(
            past_key_values=past_key_values, attention_mask=attention_mask, use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )  # fmt: skip
        first = past_key_values is None or past_key_values.is_empty()
        if first and inputs_embeds is not None:
            return {**inputs, "inputs_embeds": inputs_embeds}
        read = 0 if first else past_key_values.get_seq_length()
        if inputs_embeds is not None:  # ids of the new tokens only
            read -= inputs_embeds.shape[1]
        if input_ids.shape[1] <= read:
            raise ValueError(
                f"input_ids must reach beyond the {read} columns that past_key_values has read, "
                f"got {input_ids.shape[1]} columns"
            )
        return {**inputs, "input_ids": input_ids[:, read:]}


AutoModel.register(BMojoConfig, BMojoModel, exist_ok=True)
AutoModelForCausalLM.register(BMojoConfig, BMojoForCausalLM, exist_ok=True)
