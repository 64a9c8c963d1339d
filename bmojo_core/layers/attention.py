"""Eidetic memory of finite span: attention, whose state is a shift register of keys and values.

    out_t = W_o sum_s softmax_s(q_t . k_s / sqrt(p)) v_s,   s in (t - w, t]        (section 3.2)

As a realization, its A is the block up-shift: every step moves the register by one place and puts
(k_t, v_t) into the last; after w steps nothing of an input is left (deadbeat).  The register is
kept as a ring, so that a step writes one place instead of moving them all.  In front of the ring a
B'MOJO layer keeps its m memory tokens, so that a step attends to one list and copies nothing.

Symbols
-------
b, l, d    batch, length, model width
h, g, p    heads, key-value heads, head width
w          window; None for full attention, whose register grows with the sequence
m          memory tokens in front of the ring (0 in plain attention)
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bmojo_core.config import BMojoConfig
from bmojo_core.layers.rotary import Rotary
from bmojo_core.layers.rows import is_valid, may_lack_window, take
from bmojo_core.layers.shared import maps
from bmojo_core.ops import memory_attention
from bmojo_core.ops.memory_attention.step import write_compiled

State = TypeVar("State", bound=tuple)  # a named tuple of tensors


class Register(NamedTuple):
    """Keys and values: m memory tokens, then the ring, in which position s has place s mod w.

    Head by head, so that a step reads each head's keys in one run through memory.  A step writes
    in place; who keeps an older state has to copy it first (``BMojoCache.own``).
    """

    k: Float[Tensor, "b g mw p"]
    v: Float[Tensor, "b g mw p"]


class Growing(NamedTuple):
    """All keys and values so far, and which of them are tokens (full attention)."""

    k: Float[Tensor, "b t g p"]
    v: Float[Tensor, "b t g p"]
    valid: Bool[Tensor, "b t"]


class Projections(nn.Module):
    """q, k, v and output maps of attention, with rotary positions where configured."""

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__()
        d, p, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.p = p
        self.q_proj = nn.Linear(d, config.num_heads * p, bias=bias)
        self.k_proj = nn.Linear(d, config.num_kv_heads * p, bias=bias)
        self.v_proj = nn.Linear(d, config.num_kv_heads * p, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * p, d, bias=config.attention_output_bias)
        self.rotary = Rotary(config) if config.position == "rope" else None

    def queries(
        self, u: Float[Tensor, "b *l d"], position: Int[Tensor, "b *l"] | None
    ) -> Float[Tensor, "b *l h p"]:
        """W_q u, rotated to its position."""
        return self._heads(self.q_proj(u), position)

    def keys_values(
        self, u: Float[Tensor, "b *l d"], position: Int[Tensor, "b *l"] | None
    ) -> tuple[Float[Tensor, "b *l g p"], Float[Tensor, "b *l g p"]]:
        """W_k u, rotated to its position, and W_v u."""
        return self._heads(self.k_proj(u), position), self._heads(self.v_proj(u))

    def all(
        self,
        u: Float[Tensor, "b l d"],
        content: Float[Tensor, "b l d"],
        position: Int[Tensor, "b l"] | None,
    ) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b l g p"], Float[Tensor, "b l g p"]]:
        """Queries of u; keys and values of ``content``, which may be u itself."""
        if content is u:
            q, k, v = maps(u, self.q_proj, self.k_proj, self.v_proj)
        else:
            q, (k, v) = self.q_proj(u), maps(content, self.k_proj, self.v_proj)
        return self._heads(q, position), self._heads(k, position), self._heads(v)

    def output(self, heads: Float[Tensor, "b l h p"]) -> Float[Tensor, "b l d"]:
        """W_o applied to the concatenated heads."""
        return self.o_proj(heads.flatten(-2))

    def _heads(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """x head by head, turned to its position where there is one."""
        heads = x.unflatten(-1, (-1, self.p))
        turned = self.rotary is not None and position is not None
        return self.rotary(heads, position) if turned else heads


def positions(start: Int[Tensor, "b"] | None, u: Float[Tensor, "b l d"]) -> Int[Tensor, "b l"]:
    """Positions of the columns of u in their sequences, which have read ``start`` tokens before."""
    if start is not None and u.shape[1] == 1:
        return start[:, None]
    columns = torch.arange(u.shape[1], device=u.device).expand(u.shape[0], -1)
    return columns if start is None else start[:, None] + columns


class Attention(nn.Module):
    """Causal softmax attention over a window or over everything, (b, l, d) -> (b, l, d)."""

    def __init__(self, config: BMojoConfig, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.projections = Projections(config)

    def forward(
        self,
        u: Float[Tensor, "b l d"],
        state: Register | Growing | None = None,
        start: Int[Tensor, "b"] | None = None,
        lengths: Int[Tensor, "b"] | None = None,
        keep_state: bool = False,
    ) -> tuple[Float[Tensor, "b l d"], Register | Growing | None]:
        """Output and, if ``keep_state``, the register after each row's last valid token."""
        at = None if self.projections.rotary is None else positions(start, u)
        q, k, v = self.projections.all(u, u, at)
        attend = self._attend_all if self.window is None else self._attend_window
        heads, new_state = attend(q, k, v, state, start, lengths, keep_state)
        return self.projections.output(heads), new_state

    def _attend_window(self, q, k, v, state, start, lengths, keep_state):
        w = self.window
        if state is None:
            heads = memory_attention(q, k, v, window=w, chunk=None)
        elif q.shape[1] == 1 and lengths is None:
            state = writable(state, keep_state, q, k, v)
            write_step(state, k, v, w, start)
            return attend_step(q, state, w, start), state if keep_state else None
        else:
            past_k, past_v, past_valid = past_window(state, w, start)
            here = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
            heads = memory_attention(
                q, torch.cat([past_k, k], 1), torch.cat([past_v, v], 1),
                window=w, chunk=None, key_valid=torch.cat([past_valid, here], 1),
            )  # fmt: skip
        if not keep_state:
            return heads, None
        return heads, write_register(state, k, v, w, start, lengths)

    def _attend_all(self, q, k, v, state, start, lengths, keep_state):
        if state is None and not keep_state:
            return memory_attention(q, k, v, window=None, chunk=None), None
        here = (
            torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
            if lengths is None
            else is_valid(lengths, k.shape[1])
        )
        if state is None:
            heads = memory_attention(q, k, v, window=None, chunk=None)
            return heads, Growing(k, v, here)
        new = Growing(
            torch.cat([state.k, k], 1), torch.cat([state.v, v], 1),
            torch.cat([state.valid, here], 1),
        )  # fmt: skip
        heads = memory_attention(q, new.k, new.v, window=None, chunk=None, key_valid=new.valid)
        return heads, new if keep_state else None


def past_window(
    register: Register, w: int, start: Int[Tensor, "b"]
) -> tuple[Float[Tensor, "b r g p"], Float[Tensor, "b r g p"], Bool[Tensor, "b r"]]:
    """The last w - 1 keys and values in order of age, and which of them exist (r = w - 1)."""
    at = start[:, None] + torch.arange(1 - w, 0, device=start.device)  # (b, w-1) positions
    k, v = (x[:, :, x.shape[2] - w :].transpose(1, 2) for x in register)
    return take(k, at % w), take(v, at % w), at >= 0


def write_register(
    register: Register | None,
    k: Float[Tensor, "b l g p"],
    v: Float[Tensor, "b l g p"],
    w: int,
    start: Int[Tensor, "b"] | None,
    lengths: Int[Tensor, "b"] | None,
) -> Register:
    """The ring after the new tokens: each place holds the newest token that belongs there."""
    b, l = k.shape[:2]
    first = torch.zeros(b, dtype=torch.long, device=k.device) if start is None else start
    last = first + (l if lengths is None else lengths) - 1  # (b,) position of the newest token
    place = torch.arange(w, device=k.device)
    newest = last[:, None] - (last[:, None] - place) % w  # (b, w) who belongs in each place
    column = newest - first[:, None]  # among the new tokens, or negative
    fresh = (column >= 0)[..., None, None]
    column = column.clamp(0, l - 1)
    new = (take(x, column).transpose(1, 2).contiguous() for x in (k, v))  # (b, g, w, p)
    fresh = fresh.transpose(1, 2)
    if register is None:
        return Register(*(x * fresh for x in new))
    old = (x[:, :, x.shape[2] - w :] for x in register)
    return Register(*(torch.where(fresh, n, o) for n, o in zip(new, old, strict=True)))


def writable(state: State, keep_state: bool, *inputs: Tensor) -> State:
    """The state's tensors, or copies where a write in place would be seen by someone else.

    That is: by autograd, or by a caller who does not ask for the next state.
    """
    differentiable = any(x.requires_grad for x in (*state, *inputs))
    if keep_state and not (torch.is_grad_enabled() and differentiable):
        return state
    return type(state)(*(x.clone() for x in state))


def write_step(
    register: Register, k: Float[Tensor, "b 1 g p"], v: Float[Tensor, "b 1 g p"], w: int,
    start: Int[Tensor, "b"],
) -> None:  # fmt: skip
    """One token more, in place: cost 1, not w."""
    if write_compiled(*register, k, v, start, w):
        return
    if k.dtype != register.k.dtype:
        raise ValueError(
            f"past_key_values must hold {k.dtype} as the model computes, got {register.k.dtype}; "
            "past_key_values.to(dtype) converts them"
        )
    place = register.k.shape[2] - w + start % w
    if torch.compiler.is_compiling():  # it writes these in place, and copies the ring to scatter
        rows = torch.arange(place.shape[0], device=place.device)
        register.k[rows, :, place] = k[:, 0]
        register.v[rows, :, place] = v[:, 0]
        return
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (b, g, 1, p)
    index = place[:, None, None, None].expand_as(k)
    register.k.scatter_(2, index, k)
    register.v.scatter_(2, index, v)


def attend_step(
    q: Float[Tensor, "b 1 h p"],
    register: Register,
    w: int,
    start: Int[Tensor, "b"],
    mem_valid: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b 1 h p"]:
    """One query against the memory tokens and all written places of the ring.

    ``mem_valid`` says which memory tokens there are (all, when None).  The softmax does not care
    for order, so the ring needs no sorting.
    """
    mask = None  # a long sequence sees every place, and attention without a mask is faster
    if mem_valid is not None or may_lack_window(start, w):
        visible = torch.arange(w, device=q.device) <= start[:, None]  # place s holds position s
        if mem_valid is None:
            mem_valid = visible.new_ones(visible.shape[0], register.k.shape[2] - w)
        mask = torch.cat([mem_valid, visible], 1)[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), register.k, register.v, attn_mask=mask,
        enable_gqa=q.shape[2] != register.k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)
