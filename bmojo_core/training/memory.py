"""How much memory training takes, before it is tried.

With P parameters and AdamW in float32 every parameter costs 4 bytes, its gradient 4, its two
moments 8.  Shards (FSDP2) split all 16 over R ranks; a block is gathered whole when it is used:

    weights      16 P / R
    gathered     4 (P_0 + 2 P_b) + 4 P_b        embedding and norm P_0; a block P_b in use, the next
                                                one on its way, one block's gradient      (R > 1)
    stream       s b l d                        the residual stream before every block, kept for
                                                backward with gradient checkpointing
    logits       (s + 2 * 4) b l v              logits, their float32 copy and its gradient

What one block needs while its backward runs comes on top and depends on the backend; it does not
grow with depth.

Symbols: b, l, d, v batch a rank, length, width, vocabulary; s bytes of a number (2 in bfloat16).
"""

from __future__ import annotations

from dataclasses import dataclass

from bmojo_core.config import BMojoConfig, sublayer_parameters

PARAMETER, GRADIENT, MOMENTS = 4, 4, 8  # bytes of each, in float32


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    moments: int
    gathered: int
    stream: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())

    def table(self) -> list[tuple[str, int]]:
        """Name and bytes of every part, the total last."""
        names = ("parameters", "gradients", "AdamW's moments", "gathered blocks",
                 "stream (checkpointed)", "logits and their gradient")  # fmt: skip
        return [*zip(names, vars(self).values(), strict=True), ("together", self.total)]


def training_memory(
    config: BMojoConfig, ranks: int, batch: int, length: int, activation_bytes: int = 2
) -> TrainingMemory:
    """Bytes on each of ``ranks`` GPUs that hold shards, for ``batch`` rows of ``length`` each.

    Raises
    ------
    ValueError
        When a size is not positive.
    """
    for name, value in {"ranks": ranks, "batch": batch, "length": length}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    count = config.parameter_count
    blocks = [sublayer_parameters(config, kind) for kind in config.layer_types]
    rest, block = count - sum(blocks), max(blocks)
    gathered = PARAMETER * (rest + 2 * block) + GRADIENT * block if ranks > 1 else 0
    tokens, depth = batch * length, len(blocks)
    return TrainingMemory(
        parameters=-(-PARAMETER * count // ranks),
        gradients=-(-GRADIENT * count // ranks),
        moments=-(-MOMENTS * count // ranks),
        gathered=gathered,
        stream=activation_bytes * tokens * config.hidden_size * depth,
        logits=(activation_bytes + 2 * PARAMETER) * tokens * config.vocab_size,
    )
