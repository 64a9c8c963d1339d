"""Which tokens become eidetic: selection policies behind one function.

A policy gives every token a score from what is known when the token is read; the memory keeps
the m_e largest scores of the past (Algorithm 1, step 4).  The paper's policy is the innovation

    e_t = || y_t - (y_{t-1} + .. + y_{t-k}) / k ||^2 / d

and every other policy here is a control for it.  To try a rule of your own, write a function
``Observed -> scores`` and register it under a name; configurations may then ask for it::

    @register_policy("longest_key")
    def longest_key(seen):
        return seen.keys.square().sum((-1, -2))

What only some rules look at is kept only for those that ask, for example
``needs=("past_key_sum",)``.  Two rules ask for more than a sum:

    learned_predictor       e_t = || y_t - sum_j a_j * y_{t-j} ||^2 / d
    accumulated_attention   e_i = sum_{t = i}^{i+w-1} mean_h softmax_s(q_t . k_s)_i,  s in window

The weights a (d, k) of the first, one set a channel as in a short convolution, are trained beside
the model by a loss of their own (`predictor_loss`).  The second knows a token's score only when
the token leaves the window, so it stores tokens no earlier.

Symbols
-------
b, l, d    batch, length, model width
g, p       key-value heads and their width          h, w    heads, window
k          innovation taps
y_t        output of the fading memory (the SSM) at t
e_t        score of token t
a          weights of the learned predictor
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
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
    predictor
        Weights (d, k) of the past k outputs, the latest first; None unless the policy needs them.
    window_mass
        Attention that each token received from the queries of this stretch, itself included
        (b, l); None unless the policy needs it.  What later queries give while the token is in
        their window is added to its score.
    """

    y: Float[Tensor, "b l d"]
    past_y: Float[Tensor, "b k d"]
    keys: Float[Tensor, "b l g p"]
    past_key_sum: Float[Tensor, "b g p"] | None
    position: Int[Tensor, "b l"]
    oracle: Float[Tensor, "b l"] | None
    taps: int
    seed: int
    predictor: Float[Tensor, "d k"] | None = None
    window_mass: Float[Tensor, "b l"] | None = None


Policy = Callable[[Observed], Float[Tensor, "b l"]]
POLICIES: dict[str, Policy] = {}
NEEDS: dict[str, frozenset[str]] = {}  # by policy: the fields below that it reads
# Fields of Observed that cost a state, weights or a delay of their own.
ON_DEMAND = frozenset({"past_key_sum", "predictor", "window_mass"})


def register_policy(name: str, needs: Iterable[str] = ()) -> Callable[[Policy], Policy]:
    """Make a policy available to ``BMojoConfig(selection=name)``.

    A function that is defined again (an edited cell, run once more) takes the place of the one
    before it.

    Parameters
    ----------
    name
        What configurations call it.
    needs
        Fields of ``Observed`` that the model has for those that ask: ``"past_key_sum"``,
        ``"predictor"``, ``"window_mass"``.

    Raises
    ------
    ValueError
        When the name is taken by another function, or a field in ``needs`` is not on demand.
    """
    if not ON_DEMAND.issuperset(needs):
        raise ValueError(f"needs may hold {sorted(ON_DEMAND)}, got {sorted(needs)}")

    def keep(policy: Policy) -> Policy:
        if _defined_as(POLICIES.get(name, policy)) != _defined_as(policy):
            raise ValueError(f"selection policy {name!r} is already registered")
        POLICIES[name], NEEDS[name] = policy, frozenset(needs)
        return policy

    return keep


def _defined_as(policy: Policy) -> tuple[str | None, str | None]:
    return getattr(policy, "__module__", None), getattr(policy, "__qualname__", None)


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


@register_policy("learned_predictor", needs=("predictor",))
def learned_predictor(seen: Observed) -> Float[Tensor, "b l"]:
    """How badly trained weights of the last k outputs predict this one."""
    return (seen.y - predicted(seen)).float().square().mean(-1)


@register_policy("accumulated_attention", needs=("window_mass",))
def accumulated_attention(seen: Observed) -> Float[Tensor, "b l"]:
    """The attention that a token received while it was in the window (as in H2O's heavy hitters).

    Counted over the window alone, so that the score is fixed once the token has left it and does
    not depend on what memory holds.
    """
    return seen.window_mass


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
    """Scores by the named policy: float32 and outside the graph, for selection has no gradient.

    Raises
    ------
    ValueError
        For a name that is not registered, scores of another shape, and (on a CPU, where asking
        costs nothing) scores that are nan.
    """
    if name not in POLICIES:
        raise ValueError(f"selection must be one of {sorted(POLICIES)}, got {name!r}")
    with torch.no_grad():
        score = _asked(name, seen).detach().float()
    if score.shape != seen.y.shape[:2]:
        raise ValueError(
            f"selection policy {name!r} must return one score a token, (b, l) = "
            f"{tuple(seen.y.shape[:2])}, got {tuple(score.shape)}"
        )
    asked = score.device.type == "cpu" and not torch.compiler.is_compiling()
    # where the outputs are not finite the weights are to blame, and the model says so
    if asked and score.isnan().any() and seen.y.isfinite().all():
        raise ValueError(f"selection policy {name!r} must return numbers, got nan")
    return score


def _asked(name: str, seen: Observed) -> Tensor:
    """The policy's answer; where it stumbles over what it was not given, the error says so."""
    if torch.compiler.is_compiling():
        return POLICIES[name](seen)
    try:
        return POLICIES[name](seen)
    except (AttributeError, TypeError) as error:
        missing = [field for field in sorted(ON_DEMAND) if getattr(seen, field) is None]
        error.add_note(
            f"In selection policy {name!r}: {', '.join(missing)} are None unless the policy is "
            "registered with needs=(...) that names them."
        )
        raise


def asks_for(selection: str, field: str) -> bool:
    """Whether the named policy needs a field of ``Observed`` that is on demand."""
    return field in NEEDS.get(selection, ())


# -- the learned predictor ------------------------------------------------------------------------


def predicted(seen: Observed) -> Float[Tensor, "b l d"]:
    """sum_j a_j * y_{t-j}, j = 1 .. k, channel by channel."""
    joined, l = torch.cat([seen.past_y, seen.y], 1), seen.y.shape[1]
    late = (joined[:, seen.taps - j : seen.taps - j + l] for j in range(1, seen.taps + 1))
    return sum(a * y for a, y in zip(seen.predictor.unbind(1), late, strict=True))


def predictor_loss(seen: Observed, valid: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, ""]:
    """Mean over channels of error energy by output energy, as a function of the weights a alone.

    The outputs are constants here.  Each channel is measured by its own energy, so that gradients
    are of order one whatever the scale of y; a's optimum is not moved by that.

    Parameters
    ----------
    seen
        With ``predictor``.
    valid
        Which columns hold a token (all, when None); the others do not count.
    """
    seen = replace(seen, y=seen.y.detach(), past_y=seen.past_y.detach())
    error, energy = (_wide(x).square() for x in (seen.y - predicted(seen), seen.y))
    if valid is not None:
        error, energy = error * valid[..., None], energy * valid[..., None]
    return (error.sum((0, 1)) / (energy.sum((0, 1)) + 1e-12)).mean()


class _AlsoMinimise(torch.autograd.Function):
    """x, whose backward pass also descends a loss: its gradient is 1, whatever x's is."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.one


def also_minimise(x: Float[Tensor, "b l d"], loss: Float[Tensor, ""]) -> Float[Tensor, "b l d"]:
    """x unchanged; who trains through it trains the loss's own parameters as well.

    So no training loop has to know of the loss.  It reaches nothing but what it depends on.

    The gradient is added once a reading, whatever the factor on the loss that is trained: where
    several readings make a step (batches accumulated, chunks) it is their sum, and
    ``training.train`` takes the mean.  Other loops get the sum, and behind a ``GradScaler``, which
    multiplies the loss and divides every gradient by its scale, all but nothing: Adam, which does
    not see a constant factor, still trains the predictor, plain gradient descent does not.
    """
    return _AlsoMinimise.apply(x, loss)


# -- accumulated attention ------------------------------------------------------------------------


def received_attention(
    q: Float[Tensor, "b l h p"],
    k: Float[Tensor, "b l g p"],
    past_k: Float[Tensor, "b r g p"],
    past_valid: Bool[Tensor, "b r"],
    valid: Bool[Tensor, "b l"] | None = None,
) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b l"]]:
    """What l queries give to the r = w - 1 tokens before them, and to their own tokens.

    Mean over heads of the softmax over the window, summed over queries.  Queries are taken c at a
    time (c = w, or l if that is less): their windows lie in c + w - 1 successive keys.

    Parameters
    ----------
    q, k
        Queries and keys of the new tokens.
    past_k, past_valid
        The keys before them, oldest first, and which of those exist.
    valid
        Which new columns hold a token (all, when None): the first few of each row.
    """
    b, l, (r, g) = q.shape[0], q.shape[1], past_k.shape[1:3]
    w, c = r + 1, min(r + 1, l)
    n = -(-l // c)  # blocks of c queries
    more = n * c - l
    keys = F.pad(torch.cat([past_k, k], 1), (0, 0, 0, 0, 0, more)).unfold(1, c + r, c)
    exists = F.pad(past_valid, (0, n * c), value=True).unfold(1, c + r, c)  # (b, n, c + r)
    queries = F.pad(q, (0, 0, 0, 0, 0, more)).reshape(b, n, c, g, -1, q.shape[-1])
    logits = torch.einsum("bnighp,bngpj->bnghij", queries, keys) * q.shape[-1] ** -0.5
    ahead = torch.arange(c + r, device=q.device) - torch.arange(c, device=q.device)[:, None]
    in_window = (ahead >= 0) & (ahead < w)  # query i sees keys i .. i + r of its block
    visible = (in_window & exists[:, :, None])[:, :, None, None]
    share = _wide(logits).masked_fill(~visible, float("-inf")).softmax(-1).mean((2, 3))
    here = torch.ones(b, l, dtype=torch.bool, device=q.device) if valid is None else valid
    given = (share * F.pad(here, (0, more)).reshape(b, n, c, 1)).sum(2)  # (b, n, c + r)
    column = c * torch.arange(n, device=q.device)[:, None] + torch.arange(c + r, device=q.device)
    total = given.new_zeros(b, n * c + r).index_add_(1, column.flatten(), given.flatten(1))
    return total[:, :r], total[:, r : r + l]


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: sums of many squares need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
