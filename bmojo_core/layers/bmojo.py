"""The B'MOJO block: fading and eidetic memory joined in one softmax (Algorithm 1).

    y_t   = SSM(u_{<= t})                                             fading memory
    e_t   = || y_t - mean(y_{t-1} .. y_{t-k}) ||^2                    innovation
    M     = the m_e past tokens with the largest e                    eidetic memory
    out_t = softmax( q_t . [ F | M | window ] ) [ v_F | v_M | v_window ]

The paper leaves open how the two halves meet.  Both readings are here:

    stacked    h <- h + SSM(norm h);  h <- h + Attn(norm h)           the default
    parallel   h <- h + Attn(u),  u = norm h,  y = SSM(u)             Algorithm 1 to the letter

Memory added to a trained model enters through gates a, g that begin at zero (``memory_gates``):

    h <- h + a * y,   out = out_window + g (out_joint - out_window)

Both have a gradient at zero (y and out_joint - out_window), which a bias of -inf on the memory
tokens' logits does not; with a = g = 1 the block is as without gates.

Symbols
-------
b, l, d    batch, length, model width
w, c       window, chunk length
m          m_f + m_e memory tokens
f          phase: how many tokens of its chunk a row has already read
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import initialization as init

from bmojo_core.config import BMojoConfig
from bmojo_core.layers import eidetic
from bmojo_core.layers.attention import (
    Projections,
    Register,
    attend_step,
    past_window,
    positions,
    writable,
    write_register,
    write_step,
)
from bmojo_core.layers.eidetic import Before, EideticState, InUse, Memory, Tokens
from bmojo_core.layers.mamba import Mamba, SSMState
from bmojo_core.layers.rows import (
    align,
    is_valid,
    may_begin_chunk,
    may_lack,
    slide,
    take,
    unalign,
)
from bmojo_core.layers.selection import (
    Observed,
    also_minimise,
    predictor_loss,
    received_attention,
    score_tokens,
)
from bmojo_core.ops import causal_conv1d, memory_attention
from bmojo_core.ops.rms_norm import rms_norm


class BMojoState(NamedTuple):
    """All that a B'MOJO block carries: constant size, whatever has been read."""

    ssm: SSMState
    window: Register
    memory: EideticState
    tail: Float[Tensor, "b k d"]  # inputs of the key convolution (k = 0 without one)


class Watched(NamedTuple):
    """What an inspector may see of one reading: queries, keys, scores, memory of every chunk."""

    q: Float[Tensor, "b l h p"]
    k: Float[Tensor, "b l g p"]
    score: Float[Tensor, "b l"]
    memory: Memory
    window: int
    chunk: int
    gate: Float[Tensor, "h"] | None  # what memory changes, head by head; None: all of it


class BMojo(nn.Module):
    """One residual block, (b, l, d) -> (b, l, d)."""

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__()
        self.stacked = config.wiring == "stacked"
        self.ssm_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ssm = Mamba(config)
        if self.stacked:
            self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = MemoryAttention(config)
        self.gated = config.memory_gates and self.stacked
        if self.gated:
            self.ssm_gate = nn.Parameter(torch.zeros(config.hidden_size))

    def reset_parameters(self) -> None:
        """The gate begins closed."""
        if self.gated:
            init.zeros_(self.ssm_gate)

    def forward(
        self,
        h: Float[Tensor, "b l d"],
        state: BMojoState | None = None,
        start: Int[Tensor, "b"] | None = None,
        lengths: Int[Tensor, "b"] | None = None,
        keep_state: bool = False,
        memory_scores: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], BMojoState | None]:
        """The residual stream after the block and, if ``keep_state``, the state.

        Parameters
        ----------
        h
            Residual stream; row i is valid in its first ``lengths[i]`` columns (all, when None).
        state, start
            State carried from the ``start`` (b,) tokens that each row has read; None at the start.
        memory_scores
            Scores for ``selection="oracle"``.
        """
        u = rms_norm(h, self.ssm_norm)
        y, ssm = self.ssm(u, state.ssm if state else None, lengths, keep_state)
        if self.stacked:
            h = h + (self.ssm_gate * y if self.gated else y)
            u = rms_norm(h, self.attention_norm)
        out, rest = self.attention(u, y, state, start, lengths, keep_state, memory_scores)
        return h + out, BMojoState(ssm, *rest) if keep_state else None


class MemoryAttention(nn.Module):
    """Attention over [fading | eidetic | window] tokens, given the SSM's outputs y."""

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__()
        self.config, self.settings = config, eidetic.Settings.of(config)
        d = config.hidden_size
        self.projections = Projections(config)
        self.has_memory = config.num_fading_tokens + config.num_eidetic_tokens > 0
        self.watchers: list[Callable[[Watched], None]] = []  # see every reading from the start
        if config.num_fading_tokens and config.normalize_fading:
            self.fading_norm = nn.RMSNorm(d, eps=config.norm_eps)
        self.separate = self.has_memory and config.memory_projections == "separate"
        if self.separate:
            groups, bias = config.num_kv_heads * config.head_dim, config.attention_bias
            self.memory_k_proj = nn.Linear(d, groups, bias=bias)
            self.memory_v_proj = nn.Linear(d, groups, bias=bias)
        if config.key_kernel:
            self.key_conv = nn.Parameter(torch.zeros(d, config.key_kernel))
        learned = eidetic.needs(config, "predictor")
        weights = nn.Parameter(torch.zeros(d, config.innovation_taps)) if learned else None
        self.register_parameter("predictor", weights)
        self.gated = config.memory_gates and self.has_memory
        if self.gated:
            self.memory_gate = nn.Parameter(torch.zeros(config.num_heads))

    def reset_parameters(self) -> None:
        """Gates closed, the key convolution the identity, the predictor the fixed average."""
        if self.gated:
            init.zeros_(self.memory_gate)
        if self.settings.key_kernel:
            identity = torch.zeros(self.key_conv.shape)
            identity[:, -1] = 1.0
            init.copy_(self.key_conv, identity)
        if self.predictor is not None:
            init.constant_(self.predictor, 1 / self.settings.innovation_taps)

    def forward(
        self,
        u: Float[Tensor, "b l d"],
        y: Float[Tensor, "b l d"],
        state: BMojoState | None,
        start: Int[Tensor, "b"] | None,
        lengths: Int[Tensor, "b"] | None,
        keep_state: bool,
        oracle: Float[Tensor, "b l"] | None,
    ) -> tuple[Float[Tensor, "b l d"], tuple[Register, EideticState, Tensor] | None]:
        """Output and, if ``keep_state``, (register, memory, tail of the key convolution)."""
        if state is None:
            self._read_settings()
        else:
            eidetic.check_goes_on(self.settings, state.memory)
        at = positions(start, u)
        content, tail = self._content(u, state, lengths, keep_state)
        q, k, v = self.projections.all(u, content, at)
        window = state.window if state else None
        carried = state.memory if state else eidetic.nothing_before(self.settings, k)
        mass = None
        if eidetic.needs(self.settings, "window_mass"):
            earlier, mass = self._received(q, k, window, start, lengths)
            if carried.waiting is not None:
                carried = carried._replace(waiting=eidetic.add_to_waiting(carried.waiting, earlier))
        tokens, seen = self.candidates(content, k, v, y, at, carried, oracle, mass)
        stream = eidetic.merge_candidates(carried.waiting, tokens)
        if lengths is not None:
            hidden = ~is_valid(lengths, at.shape[1])
            stream = stream._replace(score=stream.score.masked_fill(hidden, eidetic.EMPTY))
        one_step = state is not None and u.shape[1] == 1 and lengths is None
        read = self._step if one_step else self._continue if state else self._from_start
        heads, window, current, best = read(
            q, k, v, y, stream, carried, window, start, lengths, keep_state
        )
        out = self.projections.output(heads)
        if seen.predictor is not None and torch.is_grad_enabled():
            here = None if lengths is None else is_valid(lengths, at.shape[1])
            out = also_minimise(out, predictor_loss(seen, here))
        if not keep_state:
            return out, None
        memory = EideticState(
            current, best, eidetic.still_waiting(carried.waiting, tokens, lengths),
            slide(carried.outputs, y, lengths),
            _add_keys(carried.key_sum, seen.keys, lengths),
        )  # fmt: skip
        return out, (window, memory, tail)

    def _read_settings(self) -> None:
        """As a text begins: the rule of a trained model may be exchanged, and from then on it
        holds for all texts, those begun under another one included."""
        settings = eidetic.Settings.of(self.config)
        if eidetic.needs(settings, "predictor") and self.predictor is None:
            raise ValueError(
                f"selection {settings.selection!r} needs weights that this model was made without: "
                "it must be the configuration's when the model is built"
            )
        self.settings = settings

    # -- what enters memory ---------------------------------------------------------------------

    def candidates(
        self, u: Tensor, k: Tensor, v: Tensor, y: Tensor, at: Tensor,
        carried: EideticState | Before, oracle: Tensor | None, window_mass: Tensor | None,
    ) -> tuple[Tokens, Observed]:  # fmt: skip
        """Every new token with its score and the key and value it would be remembered by."""
        c = self.settings
        if c.normalize_innovation:
            scored, past = (F.rms_norm(x, x.shape[-1:]) for x in (y, carried.outputs))
        else:
            scored, past = y, carried.outputs
        past = past[:, past.shape[1] - c.innovation_taps :]
        seen = Observed(
            scored, past, k, carried.key_sum, at, oracle, c.innovation_taps, c.selection_seed,
            self.predictor if eidetic.needs(c, "predictor") else None, window_mass,
        )  # fmt: skip
        if c.num_eidetic_tokens == 0:
            return Tokens(k, v, at.float(), at), seen
        score = score_tokens(c.selection, seen)
        memory_k, memory_v = self.memory_keys_values(u, at, (k, v))
        return Tokens(memory_k, memory_v, score, at), seen

    def _received(
        self, q: Tensor, k: Tensor, window: Register | None, start: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b l"]]:  # fmt: skip
        """Attention given by the new queries: to the r = w - 1 tokens before, and to the new."""
        w, (b, l, g, p) = self.settings.window, k.shape
        past_k = k.new_zeros(b, w - 1, g, p)
        exists = torch.zeros(b, w - 1, dtype=torch.bool, device=k.device)
        if window is not None:
            past_k, _, exists = past_window(window, w, start)
        here = None if lengths is None else is_valid(lengths, l)
        with torch.no_grad():
            return received_attention(q, k, past_k, exists, here)

    def memory_keys_values(
        self, tokens: Float[Tensor, "b *l d"], at: Int[Tensor, "b *l"],
        shared: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "b *l g p"], Float[Tensor, "b *l g p"]]:  # fmt: skip
        """Key and value of a memory token, by the window's projections or by their own."""
        if not self.separate:
            return shared if shared is not None else self.projections.keys_values(tokens, at)
        k, v = (
            f(tokens).unflatten(-1, (-1, self.settings.head_dim))
            for f in (self.memory_k_proj, self.memory_v_proj)
        )
        rotary = self.projections.rotary
        return (k if rotary is None else rotary(k, at)), v

    def fading(
        self, y: Float[Tensor, "b l d"], outputs: Float[Tensor, "b s d"],
        start: Int[Tensor, "b"], chunks: int, phase: Int[Tensor, "b"],
    ) -> Memory:  # fmt: skip
        """The fading tokens of every chunk; those from before the sequence are not valid."""
        column = eidetic.fading_positions(self.settings, chunks, phase)  # (b, n, m_f)
        past = torch.cat([outputs, y], 1)
        index = (column + outputs.shape[1]).clamp(0, past.shape[1] - 1)
        at = column + start[:, None, None]
        return self._fading_memory(take(past, index), at, at >= 0, details=True)

    def first_fading(self, y: Float[Tensor, "b l d"], chunks: int, details: bool) -> Memory:
        """The same from the beginning: outputs are read where they are, and all rows alike.

        A token from before the sequence stands for y_1 and is not valid.
        """
        at = eidetic.first_fading_positions(self.settings, chunks, y.device)  # (n, m_f)
        tokens = y.index_select(1, at.clamp_min(0).flatten()).unflatten(1, at.shape)
        at, valid = (x.expand(y.shape[0], -1, -1) for x in (at, at >= 0))
        return self._fading_memory(tokens, at, valid, details)

    def _fading_memory(self, tokens: Tensor, at: Tensor, valid: Tensor, details: bool) -> Memory:
        if self.settings.normalize_fading and self.settings.num_fading_tokens:
            tokens = self.fading_norm(tokens.to(self.fading_norm.weight.dtype))  # under autocast
        k, v = self.memory_keys_values(tokens, at)
        if not details:
            return Memory(k, v, valid, None, None)
        return Memory(k, v, valid, at, torch.full(at.shape, float("inf"), device=at.device))

    def memories(
        self, fading: Memory | None, recalled: Memory | None, chunks: int
    ) -> tuple[Memory, Memory | None]:
        """Memory of every chunk, and eidetic memory after the last (n = 1)."""
        if recalled is None:
            return fading, None
        shift = int(self.settings.memory_update == "token")  # Algorithm 1 stores before it attends
        during = eidetic.each(lambda x: x[:, shift : shift + chunks], recalled)
        return eidetic.join(fading, during), eidetic.each(lambda x: x[:, chunks:], recalled)

    # -- three ways to read: from the start, from a carried state, one token --------------------

    def _from_start(self, q, k, v, y, stream, carried, window, start, lengths, keep_state):
        c = self.settings
        m_f, m_e = c.num_fading_tokens, c.num_eidetic_tokens
        length = eidetic.chunk_length(c)
        chunks = -(-q.shape[1] // length)
        details = keep_state or bool(self.watchers)
        after = keep_state or c.memory_update == "token"
        recalled = None
        if m_e:
            shared = stream.k is k
            recalled, stream = eidetic.recall(stream, m_e, length, after, details)
            k, v = (stream.k, stream.v) if shared else (k, v)
        fading = self.first_fading(y, chunks, details) if m_f or not m_e else None
        memory, after = self.memories(fading, recalled, chunks)
        for watcher in self.watchers:
            gate = self.memory_gate if self.gated else None
            watcher(Watched(q, k, stream.score, memory, c.window, length, gate))
        heads = self._attend(q, k, v, memory, length)
        if not keep_state:
            return heads, None, None, None
        read = lengths
        if read is None:
            read = torch.full((q.shape[0],), q.shape[1], dtype=torch.long, device=q.device)
        current = eidetic.chunk_of(memory, (read // length).clamp_max(chunks - 1))
        ring = write_register(None, k, v, c.window, None, lengths)
        best = eidetic.as_tokens(after) if m_e else eidetic.no_tokens(k, 0)
        return heads, *_put_before(current, ring), best

    def _continue(self, q, k, v, y, stream, carried, window, start, lengths, keep_state):
        c = self.settings
        length = eidetic.chunk_length(c)
        columns = eidetic.grid_columns(q.shape[1], length)
        phase, chunks = start % length, columns // length
        recalled = eidetic.eidetic_tokens_from(carried.best, stream, phase, length)
        fading = self.fading(y, carried.outputs, start, chunks, phase)
        memory, after = self.memories(fading, recalled, chunks)
        memory = _keep_first(memory, _in_use(window, carried.current), phase > 0)
        past_k, past_v, past_valid = past_window(window, c.window, start)
        here = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
        across = c.window - 1 + columns
        heads = self._attend(
            align(q, phase, columns),
            align(torch.cat([past_k, k], 1), phase, across),
            align(torch.cat([past_v, v], 1), phase, across),
            memory, length,
            align(torch.cat([past_valid, here], 1), phase, across),
        )  # fmt: skip
        heads = unalign(heads, phase, q.shape[1])
        if not keep_state:
            return heads, None, None, None
        read = phase + (q.shape[1] if lengths is None else lengths)
        current = eidetic.chunk_of(memory, (read // length).clamp_max(chunks - 1))
        ring = write_register(window, k, v, c.window, start, lengths)
        return heads, *_put_before(current, ring), eidetic.as_tokens(after)

    def _step(self, q, k, v, y, stream, carried, window, start, lengths, keep_state):
        window = writable(window, keep_state, q, k, v, y)
        best = writable(carried.best, keep_state, q, k, v, y)
        write_step(window, k, v, self.settings.window, start)
        current = carried.current
        if self.settings.memory_update == "token":  # Algorithm 1 stores before it attends
            self._store(best, stream)
            current = self._begin_chunk(y, carried, window, best, start)
        else:
            current = self._begin_chunk(y, carried, window, best, start)
            self._store(best, stream)
        there = current.valid if may_lack(current.valid) else None
        heads = attend_step(q, window, self.settings.window, start, there)
        if self.gated:
            nothing = torch.zeros_like(current.valid)
            alone = attend_step(q, window, self.settings.window, start, nothing)
            heads = self._through_gate(alone, heads)
        return heads, window, current, best

    def _store(self, best: Tokens, token: Tokens) -> None:
        if self.settings.num_eidetic_tokens:
            eidetic.insert_step(best, token)

    def _begin_chunk(
        self, y: Float[Tensor, "b 1 d"], carried: EideticState, window: Register, best: Tokens,
        start: Int[Tensor, "b"],
    ) -> InUse:  # fmt: skip
        """Rows at the beginning of a chunk get a new memory, written before their window's ring."""
        length = eidetic.chunk_length(self.settings)
        if not self.has_memory or not may_begin_chunk(start, length):
            return carried.current
        begins = start % length == 0
        fading = self.fading(y, carried.outputs, start, 1, torch.zeros_like(start))
        fresh = eidetic.join(fading, eidetic.as_memory(best))
        for old, new in zip(window, _by_head(fresh), strict=True):
            front = old[:, :, : new.shape[2]]
            front.copy_(torch.where(begins[:, None, None, None], new, front))
        tokens = InUse(fresh.valid[:, 0], fresh.position[:, 0], fresh.score[:, 0])
        return eidetic.where_rows(begins, tokens, carried.current)

    def _attend(self, q, k, v, memory: Memory, length: int, key_valid=None):
        w = self.settings.window
        if not self.has_memory:
            return memory_attention(q, k, v, window=w, chunk=None, key_valid=key_valid)
        joint = memory_attention(
            q, k, v, memory.k, memory.v, memory.valid, window=w, chunk=length, key_valid=key_valid
        )
        if not self.gated:
            return joint
        alone = memory_attention(q, k, v, window=w, chunk=None, key_valid=key_valid)
        return self._through_gate(alone, joint)

    def _through_gate(
        self, alone: Float[Tensor, "b l h p"], joint: Float[Tensor, "b l h p"]
    ) -> Float[Tensor, "b l h p"]:
        return alone + self.memory_gate[:, None] * (joint - alone)

    def _content(
        self, u: Tensor, state: BMojoState | None, lengths: Tensor | None, keep_state: bool = False
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b k d"] | None]:
        """What keys and values read: u, through the short convolution if there is one."""
        if not (self.settings.key_kernel or keep_state):
            return u, None
        taps = max(self.settings.key_kernel - 1, 0)
        tail = state.tail if state else u.new_zeros(u.shape[0], taps, u.shape[2])
        new_tail = slide(tail, u, lengths)
        if not self.settings.key_kernel:
            return u, new_tail
        past = tail if taps else None
        return causal_conv1d(u, self.key_conv, None, past), new_tail


def _put_before(memory: Memory, ring: Register) -> tuple[Register, InUse]:
    """One chunk's memory (n = 1) with its keys and values in front of the window's ring."""
    which = InUse(memory.valid[:, 0], memory.position[:, 0], memory.score[:, 0])
    pairs = zip(_by_head(memory), ring, strict=True)
    return Register(*(torch.cat(pair, 2) for pair in pairs)), which


def _by_head(memory: Memory) -> tuple[Float[Tensor, "b g m p"], Float[Tensor, "b g m p"]]:
    """Keys and values of one chunk's memory (n = 1) as a register holds them."""
    return memory.k[:, 0].transpose(1, 2), memory.v[:, 0].transpose(1, 2)


def _in_use(register: Register, current: InUse) -> Memory:
    """The inverse: the memory in use, as the memory of one chunk."""
    k, v = (x[:, :, : current.valid.shape[1]].transpose(1, 2)[:, None] for x in register)
    return Memory(k, v, *(x[:, None] for x in current))


def _keep_first(memory: Memory, current: Memory, inside: Tensor) -> Memory:
    """Rows that are inside a chunk go on with the memory that the chunk began with."""
    first = eidetic.where_rows(inside, current, Memory(*(x[:, :1] for x in memory)))
    return Memory(*(torch.cat([a, x[:, 1:]], 1) for a, x in zip(first, memory, strict=True)))


def _add_keys(
    total: Float[Tensor, "b g p"] | None, keys: Float[Tensor, "b l g p"], lengths: Tensor | None
) -> Float[Tensor, "b g p"] | None:
    if total is None:  # the policy does not look at it
        return None
    unit = F.normalize(keys.detach().float(), dim=-1)
    if lengths is not None:
        unit = unit * is_valid(lengths, unit.shape[1])[..., None, None]
    return total + unit.sum(1).to(total.dtype)
