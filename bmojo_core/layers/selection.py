"""Which tokens become eidetic: selection policies behind one function.

A policy gives every token a score from what is known when the token is read; the memory keeps
the m_e largest scores of the past (Algorithm 1, step 4).  The paper's policy is the innovation

    e_t = || y_t - (y_{t-1} + .. + y_{t-k}) / k ||^2 / d

and every other policy here is a control for it.  To try a rule of your own, write a function
``Observed -> scores`` and register it under a name; configurations may then ask for it::

    @register_policy("longest_key")
    def longest_key(seen):
        return seen.keys.square().sum((-1, -2))

What only some rules look at is summed up only for those that ask: ``needs=("past_key_sum",)``.

Symbols
-------
b, l, d    batch, length, model width
g, p       key-value heads and their width
k          innovation taps
y_t        output of the fading memory (the SSM) at t
e_t        score of token t
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bmojo_core.ops import innovation as squared_prediction_error


@dataclass(frozen=True)
class Observed:
    """What a policy may look at: the present stretch of tokens and a summary of the past.

    Attributes
    ----------
    y
        Outputs of the SSM (b, l, d).
    past_y
        The k outputs before them (b, k, d), zeros before the sequence began.
    keys
        Keys of the tokens (b, l, g, p).
    past_key_sum
        Sum of the normalised keys of all earlier tokens (b, g, p); None unless the policy needs it.
    position
        Positions of the tokens in their sequence (b, l), from 0.
    oracle
        Scores given from outside (b, l), or None: an upper bound, not a policy one could use.
    taps, seed
        ``innovation_taps`` and ``selection_seed`` of the configuration.
    """

    y: Float[Tensor, "b l d"]
    past_y: Float[Tensor, "b k d"]
    keys: Float[Tensor, "b l g p"]
    past_key_sum: Float[Tensor, "b g p"] | None
    position: Int[Tensor, "b l"]
    oracle: Float[Tensor, "b l"] | None
    taps: int
    seed: int


Policy = Callable[[Observed], Float[Tensor, "b l"]]
POLICIES: dict[str, Policy] = {}
NEEDS: dict[str, frozenset[str]] = {}  # by policy: the fields below that it reads
ON_DEMAND = frozenset({"past_key_sum"})  # fields of Observed that cost a state of their own


def register_policy(name: str, needs: Iterable[str] = ()) -> Callable[[Policy], Policy]:
    """Make a policy available to ``BMojoConfig(selection=name)``.

    Parameters
    ----------
    name
        What configurations call it.
    needs
        Fields of ``Observed`` that the model computes for those that ask: ``"past_key_sum"``.

    Raises
    ------
    ValueError
        When the name is taken by another function, or a field in ``needs`` is not on demand.
    """
    if not ON_DEMAND.issuperset(needs):
        raise ValueError(f"needs may hold {sorted(ON_DEMAND)}, got {sorted(needs)}")

    def keep(policy: Policy) -> Policy:
        if POLICIES.get(name, policy) is not policy:
            raise ValueError(f"selection policy {name!r} is already registered")
        POLICIES[name], NEEDS[name] = policy, frozenset(needs)
        return policy

    return keep


@register_policy("innovation")
def innovation(seen: Observed) -> Float[Tensor, "b l"]:
    """How badly the average of the last k outputs predicts this one (Algorithm 1, step 3)."""
    return squared_prediction_error(seen.y, seen.taps, past=seen.past_y)


@register_policy("normalized_innovation")
def normalized_innovation(seen: Observed) -> Float[Tensor, "b l"]:
    """Innovation relative to the output's own energy: large outputs alone do not surprise."""
    energy = seen.y.float().square().mean(-1)
    return innovation(seen) / (energy + 1e-6)


@register_policy("random")
def random(seen: Observed) -> Float[Tensor, "b l"]:
    """A uniform sample of the past: the hash of (seed, row-independent position) as a score."""
    return _hash_uniform(seen.position, seen.seed)


@register_policy("recency")
def recency(seen: Observed) -> Float[Tensor, "b l"]:
    """The latest tokens: eidetic memory as a longer window."""
    return seen.position.float()


@register_policy("key_diversity", needs=("past_key_sum",))
def key_diversity(seen: Observed) -> Float[Tensor, "b l"]:
    """How far a key points away from the mean direction of all keys before it."""
    keys = F.normalize(seen.keys.detach().float(), dim=-1)
    before = seen.past_key_sum.float().unsqueeze(1) + keys.cumsum(1) - keys
    return -F.cosine_similarity(keys, before, dim=-1).mean(-1)


@register_policy("oracle")
def oracle(seen: Observed) -> Float[Tensor, "b l"]:
    """Scores handed in with the batch (``memory_scores``): what perfect selection would reach.

    Raises
    ------
    ValueError
        When the model was called without ``memory_scores``.
    """
    if seen.oracle is None:
        raise ValueError("selection='oracle' needs memory_scores (b, l) in the model's call")
    return seen.oracle


def score_tokens(name: str, seen: Observed) -> Float[Tensor, "b l"]:
    """Scores by the named policy: float32 and outside the graph, for selection has no gradient."""
    with torch.no_grad():
        return POLICIES[name](seen).detach().float()


def _hash_uniform(position: Int[Tensor, "b l"], seed: int) -> Float[Tensor, "b l"]:
    """Uniform numbers that depend on (position, seed) alone, so that any split gives the same.

    A few rounds of xor-shift and multiply (in 31 bits: int64 products then cannot overflow).
    """
    mask = (1 << 31) - 1
    x = (position + 1 + 0x9E3779B1 * (seed + 1)) & mask
    for multiplier in (0x45D9F3B, 0x119DE1F3, 0x344B5409):
        x = ((x ^ (x >> 15)) * multiplier) & mask
    x = x ^ (x >> 13)
    return (x & 0xFFFFFF).float() / float(1 << 24)
