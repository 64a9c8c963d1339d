"""The fading memory: a selective (input-varying, bilinear) diagonal state-space model.

    x_t = exp(Delta_t A) x_{t-1} + Delta_t B_t u'_t          (section 3.1; appendix E)
    y_t = W_out [ (C_t . x_t + D u'_t) * silu(z_t) ]

with (u', z) = W_in u, u' <- silu(conv(u')), (r, B, C) = W_x u', Delta = softplus(W_dt r + b_dt).
The short convolution is a little eidetic memory in front of the fading one.

How it fades is one of ``FADINGS``, which differ in the shapes of A and Delta alone:

    selective       A (e, n), Delta (b, l, e): every channel and state has its own decay (the paper)
    scalar_decay    A (h,),   Delta (b, l, h): one decay a head of e / h channels (Mamba-2)

A position that is padding has Delta_t = 0, which leaves the state exactly as it is.

Symbols
-------
b, l, d    batch, length, model width
e, n       inner channels, states a channel
k          convolution taps
h          heads, where channels fade together
A          (e, n) or (h,), negative; A = -exp(A_log)
state      ``SSMState``: the last k-1 inputs of the convolution (b, k-1, e) and x_t (b, e, n)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import initialization as init

from bmojo_core.config import BMojoConfig
from bmojo_core.layers.rows import is_valid, slide
from bmojo_core.layers.shared import halves, with_map
from bmojo_core.ops import causal_conv1d, scalar_scan, selective_scan


class SSMState(NamedTuple):
    """What a selective SSM carries from one stretch of tokens to the next."""

    tail: Float[Tensor, "b k e"]
    x: Float[Tensor, "b e n"]


class Fading(NamedTuple):
    """A way to fade: its scan, and the rates -A that it begins with."""

    scan: Callable[..., tuple[Tensor, Tensor]]
    rates: Callable[[BMojoConfig], Tensor]


def _selective_rates(c: BMojoConfig) -> Float[Tensor, "e n"]:
    """Mamba's: 1 .. n in every channel."""
    return torch.arange(1.0, c.state_size + 1).repeat(c.ssm_intermediate_size, 1)


def _scalar_rates(c: BMojoConfig) -> Float[Tensor, "h"]:
    """The range that Mamba-2 draws from, 1 to 16, evenly over the heads."""
    return torch.linspace(1.0, 16.0, c.ssm_intermediate_size // c.ssm_head_dim)


# The scans are looked up by name when called, so that they can be replaced; these two functions
# have names, so that a layer can be pickled.
def _selective(*given: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    return selective_scan(*given, **options)


def _scalar(*given: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    return scalar_scan(*given, **options)


FADINGS = {
    "selective": Fading(_selective, _selective_rates),
    "scalar_decay": Fading(_scalar, _scalar_rates),
}


class Mamba(nn.Module):
    """Selective state-space layer, (b, l, d) -> (b, l, d)."""

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__()
        d, e, n = config.hidden_size, config.ssm_intermediate_size, config.state_size
        self.state_size, self.dt_rank, self.conv_kernel = n, config.dt_rank, config.conv_kernel
        self.in_proj = nn.Linear(d, 2 * e, bias=config.ssm_bias)
        self.conv1d = nn.Conv1d(e, e, config.conv_kernel, groups=e, bias=config.conv_bias)
        self.x_proj = nn.Linear(e, config.dt_rank + 2 * n, bias=False)
        self.config, self.fading = config, FADINGS[config.fading]
        self.A_log = nn.Parameter(self.fading.rates(config).log())
        self.dt_proj = nn.Linear(config.dt_rank, self.A_log.shape[0], bias=True)
        self.D = nn.Parameter(torch.ones(e))
        self.out_proj = nn.Linear(e, d, bias=config.ssm_bias)
        sizes = (config.dt_rank, n, n)
        learned = config.ssm_norms == "learned"
        plain = config.ssm_norms == "plain"
        self.norms = (
            nn.ModuleList(
                nn.RMSNorm(s, eps=config.ssm_norm_eps, elementwise_affine=not plain) for s in sizes
            )
            if learned or plain
            else None
        )

    def reset_parameters(self) -> None:
        """Mamba's own initialisation: A by ``FADINGS``, time steps log-uniform in [1e-3, 1e-1]."""
        init.copy_(self.A_log, self.fading.rates(self.config).log())
        init.ones_(self.D)
        bound = self.dt_rank**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        steps = torch.empty(self.dt_proj.bias.shape).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        init.copy_(self.dt_proj.bias, steps + torch.log(-torch.expm1(-steps)))  # softplus^-1

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> SSMState:
        """The state before any token: zeros (x is kept in float32 at least)."""
        e, n = self.D.shape[0], self.state_size
        wide = torch.promote_types(dtype, torch.float32)
        tail = torch.zeros(batch, self.conv_kernel - 1, e, device=device, dtype=dtype)
        return SSMState(tail, torch.zeros(batch, e, n, device=device, dtype=wide))

    def forward(
        self,
        u: Float[Tensor, "b l d"],
        state: SSMState | None = None,
        lengths: Int[Tensor, "b"] | None = None,
        keep_state: bool = False,
    ) -> tuple[Float[Tensor, "b l d"], SSMState | None]:
        """Output and, if ``keep_state``, the state after each row's last valid token.

        Parameters
        ----------
        u
            Inputs; row i is valid in its first ``lengths[i]`` columns (all, when None).
        state
            The state to start from; None is the empty past.
        """
        inner, z = halves(u, self.in_proj)  # (b, l, e) twice
        tail = state.tail if state is not None else None
        weight = self.conv1d.weight.squeeze(1)
        v = causal_conv1d(inner, weight, self.conv1d.bias, tail, activation="silu")
        v, rates = with_map(v, self.x_proj)
        r, B, C = rates.split((self.dt_rank, self.state_size, self.state_size), dim=-1)
        if self.norms is not None:
            r, B, C = (_normed(norm, s) for norm, s in zip(self.norms, (r, B, C), strict=True))
        y, x = self._scan(v, r, B, C, z, state, lengths)
        y = self.out_proj(y)
        if not keep_state:
            return y, None
        return y, SSMState(self._next_tail(inner, tail, lengths), x)

    def _scan(
        self, v: Tensor, r: Tensor, B: Tensor, C: Tensor, z: Tensor,
        state: SSMState | None, lengths: Tensor | None,
    ) -> tuple[Float[Tensor, "b l e"], Float[Tensor, "b e n"]]:  # fmt: skip
        delta = F.linear(r, self.dt_proj.weight)
        bias, softplus = self.dt_proj.bias, True
        if lengths is not None:  # a pad must have Delta exactly 0, which softplus never gives
            delta = F.softplus(delta + bias) * is_valid(lengths, delta.shape[1])[..., None]
            bias, softplus = None, False
        decay = self.A_log.to(_scan_dtype(v)).exp()  # widened first: an error here grows with l
        A = -decay if decay.requires_grad else decay.neg_()  # in place: no second array
        return self.fading.scan(
            v, delta, A, B, C, self.D, z,
            delta_bias=bias, delta_softplus=softplus,
            initial_state=None if state is None else state.x, return_last_state=True,
        )  # fmt: skip

    def _next_tail(
        self, inner: Tensor, tail: Tensor | None, lengths: Tensor | None
    ) -> Float[Tensor, "b k e"]:
        if tail is None:
            tail = inner.new_zeros(inner.shape[0], self.conv_kernel - 1, inner.shape[2])
        return slide(tail, inner, lengths)


def _scan_dtype(v: Tensor) -> torch.dtype:
    return torch.promote_types(v.dtype, torch.float32)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Under autocast x is narrower than the weight, and torch's fused norm takes one dtype."""
    return norm(x if norm.weight is None else x.to(norm.weight.dtype))
