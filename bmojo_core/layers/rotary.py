"""Rotary positions: a key at position s is turned by angle s * f_i in its i-th plane.

    (a, b)_i  ->  (a cos(s f_i) - b sin(s f_i),  a sin(s f_i) + b cos(s f_i))

so that q_t . k_s depends on t - s.  The planes pair feature i with feature i + p/2.  Frequencies,
and their scaled variants for long contexts, are transformers' own.

"dynamic" frequencies are the plain ones up to ``max_position_embeddings`` and change with each
token beyond: a key that was turned and stored would be at a wrong angle, so longer texts are
refused.

Symbols: p head width, f (p/2,) frequencies.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bmojo_core.config import BMojoConfig


def longest_text(config: BMojoConfig) -> int | None:
    """Tokens of the longest text whose keys stay where they were turned to; None: any."""
    kind = (config.rope_parameters or {}).get("rope_type")
    changes = config.position == "rope" and kind == "dynamic"
    return config.max_position_embeddings if changes else None


def check_length(limit: int, read: Int[Tensor, "b"] | None, new: int | Int[Tensor, "b"]) -> None:
    """Tokens read before and new ones, pads not counted, within the `longest_text`.

    Raises
    ------
    ValueError
        Otherwise.
    """
    end = new if read is None else read + new
    end = int(end.max()) if isinstance(end, Tensor) else end
    if end > limit:
        raise ValueError(
            f"a text must not be longer than max_position_embeddings {limit} with rope_type "
            f"'dynamic', got {end} tokens"
        )


class Rotary(nn.Module):
    """Rotate heads to their positions.

    Raises
    ------
    ValueError
        For a rope_type that transformers does not know or whose parameters are not all there, or
        "longrope", whose frequencies change with the length of the text: a cached key could then
        not stay as it is.
    """

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__()
        parameters = dict(config.rope_parameters or {})
        kind = parameters.get("rope_type", "default")
        if kind == "longrope" or kind not in {"default", *ROPE_INIT_FUNCTIONS}:
            allowed = sorted({"default", *ROPE_INIT_FUNCTIONS} - {"longrope"})
            raise ValueError(f"rope_parameters['rope_type'] must be in {allowed}, got {kind!r}")
        self.config = config
        frequency, self.scaling = self._frequencies(kind, parameters)
        self.register_buffer("frequency", frequency, persistent=False)

    def _frequencies(self, kind: str, parameters: dict) -> tuple[Tensor, float]:
        if kind in ("default", "dynamic"):
            p = self.config.head_dim
            exponent = torch.arange(0, p, 2, dtype=torch.int64).float() / p
            return 1.0 / float(parameters.get("rope_theta", 10000.0)) ** exponent, 1.0
        try:
            return ROPE_INIT_FUNCTIONS[kind](self.config, device=None)
        except KeyError as missing:
            raise ValueError(
                f"rope_parameters must have {missing} for rope_type {kind!r}, got {parameters}"
            ) from missing

    def reset_parameters(self) -> None:
        """Recompute the frequencies: they are not saved, and a meta device holds none."""
        parameters = dict(self.config.rope_parameters or {})
        kind = parameters.get("rope_type", "default")
        frequency, self.scaling = self._frequencies(kind, parameters)
        self.frequency = frequency.to(self.frequency.device)

    def _apply(self, function, recurse: bool = True):
        """Frequencies follow the model to a device but keep their dtype: rounded to half
        precision, they would turn a key at position 1000 by a wrong angle."""
        super()._apply(function, recurse)
        self.reset_parameters()
        return self

    def forward(
        self, heads: Float[Tensor, "b *l h p"], position: Int[Tensor, "b *l"]
    ) -> Float[Tensor, "b *l h p"]:
        wide = torch.promote_types(heads.dtype, torch.float32)
        angle = position[..., None, None].to(wide) * self.frequency.to(wide)  # (b, *l, 1, p/2)
        cos, sin = angle.cos() * self.scaling, angle.sin() * self.scaling
        a, b = heads.to(wide).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(heads.dtype)
