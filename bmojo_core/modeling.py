"""The stack: embedding, residual sublayers, norm, and a head tied to the embedding.

    h = E[ids];   h <- h + f_i(norm(h), state_i)  for every sublayer i;   logits = E norm(h)

One class serves the five kinds and follows transformers' conventions: ``save_pretrained``,
``from_pretrained``, ``generate``, ``labels`` shifted inside the model, ``past_key_values``.

Inside, every row's tokens begin in column 0 (see ``layers.rows``): a batch with padding on either
side is packed to the left when it enters and put back when it leaves, so that no pad is ever read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from bmojo_core.cache import BMojoCache
from bmojo_core.config import BMojoConfig
from bmojo_core.layers.attention import Attention
from bmojo_core.layers.bmojo import BMojo, MemoryAttention
from bmojo_core.layers.feedforward import GatedMLP, MixtureOfExperts
from bmojo_core.layers.mamba import Mamba
from bmojo_core.layers.rotary import Rotary
from bmojo_core.layers.rows import take


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
        u = self.norm(h)
        if self.kind in ("feedforward", "moe"):
            return h + self.inner(u), None
        if self.kind == "mamba":
            y, state = self.inner(u, state, lengths, keep_state)
        else:
            y, state = self.inner(u, state, start, lengths, keep_state)
        return h + y, state


@dataclass(frozen=True)
class Rows:
    """A batch whose valid tokens were moved to the left, and the way back."""

    order: Int[Tensor, "b l"]
    lengths: Int[Tensor, "b"]

    @classmethod
    def of(cls, mask: Tensor) -> Rows:
        """From a mask (b, l) that is nonzero at tokens."""
        valid = mask.bool()
        return cls((~valid).to(torch.uint8).argsort(dim=1, stable=True), valid.sum(1))

    def pack(self, x: Tensor) -> Tensor:
        """Columns of x in the order: tokens, then pads."""
        return take(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of ``pack``."""
        return take(x, self.order.argsort(dim=1))


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
        elif isinstance(module, (Mamba, MemoryAttention, Rotary)):
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
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Int[Tensor, "b l"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: Float[Tensor, "b l d"] | None = None,
        use_cache: bool | None = None,
        memory_scores: Float[Tensor, "b l"] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Parameters
        ----------
        input_ids, inputs_embeds
            Token ids (b, l), or their embeddings (b, l, d); exactly one of the two.
        attention_mask
            Nonzero at tokens (b, l), or (b, read + l) as transformers passes it; None: no padding.
        past_key_values
            State to go on from; it is updated in place.
        use_cache
            Whether to return the state; defaults to the configuration's, and to False in training.
        memory_scores
            Scores (b, l) for ``selection="oracle"``.

        Raises
        ------
        ValueError
            For an empty batch or sequence, ids out of the vocabulary, wrong dtypes, or embeddings
            that are not finite.
        """
        h = self._embed(input_ids, inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values if past_key_values is not None else BMojoCache()
        rows = _rows(attention_mask, h)
        lengths = None
        if rows is not None:
            h, lengths = rows.pack(h), rows.lengths
            memory_scores = None if memory_scores is None else rows.pack(memory_scores)
        h, states = self._run(h, cache, lengths, use_cache, memory_scores)
        h = self.norm(h)
        if use_cache:
            read = h.shape[1] if lengths is None else lengths
            zero = torch.zeros(h.shape[0], dtype=torch.long, device=h.device)
            cache.position = (zero if cache.position is None else cache.position) + read
            cache.states = states
        return BaseModelOutputWithPast(
            last_hidden_state=h if rows is None else rows.unpack(h),
            past_key_values=cache if use_cache else None,
        )

    def _run(self, h, cache, lengths, use_cache, memory_scores):
        states = cache.states or [None] * len(self.layers)
        if use_cache and not cache.is_empty():
            cache.own()
            states = cache.states
        new_states = []
        for layer, state in zip(self.layers, states, strict=True):
            arguments = (h, state, cache.position, lengths, use_cache, memory_scores)
            if self.gradient_checkpointing and self.training:
                h, new = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                h, new = layer(*arguments)
            new_states.append(new)
        return h, new_states

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = input_ids if input_ids is not None else inputs_embeds
        if given.ndim != (2 if input_ids is not None else 3) or 0 in given.shape[:2]:
            name = "input_ids (b, l)" if input_ids is not None else "inputs_embeds (b, l, d)"
            raise ValueError(f"{name} must have b >= 1 and l >= 1, got shape {tuple(given.shape)}")
        if input_ids is None:
            if not torch.compiler.is_compiling() and not bool(inputs_embeds.isfinite().all()):
                raise ValueError("inputs_embeds must be finite, got NaN or infinity")
            return inputs_embeds
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids must be in 0..{self.config.vocab_size - 1} (vocab_size "
                    f"{self.config.vocab_size}), got values from {low} to {high}"
                )
        return self.embed_tokens(input_ids)


class BMojoForCausalLM(BMojoPreTrainedModel, GenerationMixin):
    """The stack with a head: next-token logits (b, l, vocab_size)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__(config)
        self.model = BMojoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Int[Tensor, "b l"] | None = None,
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "b l"] | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: Float[Tensor, "b l d"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        memory_scores: Float[Tensor, "b l"] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss when ``labels`` are given.

        Parameters
        ----------
        labels
            The token of each column, -100 where not scored; the model shifts them, so that column
            t is predicted from columns before it (transformers' convention).
        logits_to_keep
            Compute logits of the last so many columns only; 0 for all.

        Other parameters as in ``BMojoModel.forward``.
        """
        out = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, memory_scores
        )
        h = out.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    # -- generate() -----------------------------------------------------------------------------

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # our own constant-size cache

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, use_cache=True,
        inputs_embeds=None, **kwargs,
    ):  # fmt: skip
        """The columns that the cache has not read yet."""
        new = dict(past_key_values=past_key_values, use_cache=use_cache)
        first = past_key_values is None or past_key_values.is_empty()
        if use_cache and past_key_values is None:
            new["past_key_values"] = BMojoCache()
        if first and inputs_embeds is not None:
            return {**new, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        if first or not use_cache:
            return {**new, "input_ids": input_ids, "attention_mask": attention_mask}
        return {**new, "input_ids": input_ids[:, -1:], "attention_mask": None}


def _rows(mask: Tensor | None, h: Float[Tensor, "b l d"]) -> Rows | None:
    """The packing that a mask asks for; None when every column is a token."""
    if mask is None:
        return None
    b, l = h.shape[:2]
    if mask.ndim != 2 or mask.shape[0] != b or mask.shape[1] < l:
        raise ValueError(f"attention_mask must be (b, l) = {(b, l)}, got {tuple(mask.shape)}")
    mask = mask[:, mask.shape[1] - l :]
    if not torch.compiler.is_compiling():
        if bool(mask.all()):
            return None
        if not bool(mask.any(1).all()):
            raise ValueError("attention_mask must leave at least one token in every row")
    return Rows.of(mask)
