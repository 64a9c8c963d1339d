"""The optimiser of the paper: AdamW with two learning rates, warm-up, cosine, a floor.

    lr(s) = peak s / W                                                    s <= W  (warm-up)
    lr(s) = floor + (peak - floor) (1 + cos(pi (s - W) / (S - W))) / 2    s >  W

The SSM takes Mamba's learning rate and attention GPT-3's.  What scales or places things rather
than mixing them (norms, A_log, D, biases) is not decayed: shrinking it would change the model
without making it simpler.

Symbols: s step, W warm-up steps, S all steps.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from bmojo_core.layers.mamba import Mamba

UNDECAYED = ("A_log", "D", "bias", "predictor")


def parameter_groups(
    model: nn.Module, lr_ssm: float, lr_attention: float, weight_decay: float
) -> list[dict]:
    """Parameters by learning rate (SSM or not) and decay (matrices) or none (all else).

    Every trainable parameter is in exactly one group; each group keeps its peak rate in ``peak``.
    """
    in_ssm = {id(p) for m in model.modules() if isinstance(m, Mamba) for p in m.parameters()}
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in UNDECAYED
        groups.setdefault((id(parameter) in in_ssm, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr_ssm if ssm else lr_attention,
            "peak": lr_ssm if ssm else lr_attention,
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (ssm, decayed), parameters in groups.items()
    ]


def adamw(
    model: nn.Module,
    lr_ssm: float,
    lr_attention: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    groups = parameter_groups(model, lr_ssm, lr_attention, weight_decay)
    fused = all(p.device.type == "cuda" for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, betas=betas, fused=fused)


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float) -> float:
    """The schedule above, at ``step`` in 1..steps."""
    if step <= warmup:
        return peak * step / warmup
    floor = min(floor, peak)
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: int, floor: float
) -> None:
    """Every group to its rate at ``step``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, group["peak"], warmup, floor)
