"""What holds for every model: causal, one function three ways, blind to padding, special cases.

Models are sharp (see ``peaky``) and in float64, where routes that agree do so to 1e-10 and a token
too many in one memory shows at once.
"""

import peaky
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo_core.config import KINDS
from bmojo_core.layers.eidetic import EMPTY
from bmojo_core.layers.selection import POLICIES

CLOSE = {"rtol": 1e-10, "atol": 1e-10}

STACKS = [
    ["bmojo", "bmojo"],
    ["bmojo"],
    ["mamba", "sliding_attention"],
    ["attention", "feedforward", "bmojo"],
    ["mamba", "moe"],
]
MODELS = st.fixed_dictionaries(
    {
        "layer_types": st.sampled_from(STACKS),
        "window": st.integers(1, 6),
        "memory_chunk": st.sampled_from([None, 1, 3, 8]),
        "num_fading_tokens": st.sampled_from([0, 1, 3]),
        "num_eidetic_tokens": st.sampled_from([0, 1, 4]),
        "fading_stride": st.integers(1, 3),
        "innovation_taps": st.integers(1, 4),
        "num_kv_heads": st.sampled_from([1, 2]),
        "wiring": st.sampled_from(["stacked", "parallel"]),
        "memory_update": st.sampled_from(["chunk", "token"]),
        "selection": st.sampled_from(sorted(POLICIES)),
        "key_kernel": st.sampled_from([0, 1, 3]),
        "memory_projections": st.sampled_from(["shared", "separate"]),
        "store_in_window": st.booleans(),
        "normalize_fading": st.booleans(),
        "normalize_innovation": st.booleans(),
        "position": st.sampled_from(["none", "rope"]),
        "ssm_norms": st.sampled_from([None, "learned"]),
        "conv_kernel": st.integers(1, 4),
        "fading": st.sampled_from(["selective", "scalar_decay"]),
        "ssm_head_dim": st.sampled_from([None, 4]),
        "num_experts": st.just(3),
        "num_experts_per_tok": st.just(2),
    }
)


class Reader:
    """A model, and the scores that the oracle policy is given, going along with the tokens."""

    def __init__(self, changes, seed, batch, length, dtype=torch.float64):
        self.model = peaky.model(seed=seed, dtype=dtype, **changes)
        self.tokens = peaky.ids(batch, length, seed)
        g = torch.Generator().manual_seed(seed)
        self.scores = torch.rand(batch, length, generator=g)
        self.asks = self.model.config.selection == "oracle"

    def full(self, tokens=None):
        tokens = self.tokens if tokens is None else tokens
        return peaky.logits(self.model, tokens, **self._scores(self.scores[:, : tokens.shape[1]]))

    def row(self, i, length):
        """Logits (length, vocabulary) of the beginning of row i, read alone."""
        given_scores = self._scores(self.scores[i : i + 1, :length])
        return peaky.logits(self.model, self.tokens[i : i + 1, :length], **given_scores)[0]

    @torch.no_grad()
    def read(self, tokens, scores, cache, mask=None):
        out = self.model(
            tokens, attention_mask=mask, past_key_values=cache, use_cache=True,
            **self._scores(scores),
        )  # fmt: skip
        return out.logits, out.past_key_values

    def in_pieces(self, cuts):
        """Logits of reading from cut to cut, the state carried on."""
        cache, logits = None, []
        for begin, end in zip([0, *cuts], [*cuts, self.tokens.shape[1]], strict=True):
            if begin < end:
                out, cache = self.read(self.tokens[:, begin:end], self.scores[:, begin:end], cache)
                logits.append(out)
        return torch.cat(logits, 1), cache

    def _scores(self, scores):
        return {"memory_scores": scores} if self.asks else {}


@settings(max_examples=40)
@given(MODELS, st.integers(2, 25), st.data())
def test_a_token_changes_no_output_before_it(changes, length, data):
    t = data.draw(st.integers(0, length - 1), label="changed token")
    reader = Reader(changes, data.draw(st.integers(0, 99), label="seed"), 1, length)
    other = reader.tokens.clone()
    other[:, t] = (other[:, t] + 1) % peaky.VOCABULARY
    before, after = reader.full(), reader.full(other)
    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-12)
    assert (before[:, t] - after[:, t]).abs().max() > 1e-3


@settings(max_examples=40)
@given(MODELS, st.integers(1, 30), st.lists(st.integers(0, 30), max_size=5), st.integers(0, 99))
def test_any_split_gives_the_same_function(changes, length, cuts, seed):
    reader = Reader(changes, seed, 2, length)
    want, whole = reader.full(), reader.in_pieces([])[1]
    got, state = reader.in_pieces(sorted(min(c, length) for c in cuts))
    torch.testing.assert_close(got, want, **CLOSE)
    for mine, other in zip(state.tensors(), whole.tensors(), strict=True):
        assert mine.shape == other.shape  # the state's size depends on neither split nor length


@settings(max_examples=20)
@given(MODELS, st.integers(1, 22), st.integers(0, 22), st.integers(0, 99))
def test_token_by_token_gives_the_same_function(changes, length, prompt, seed):
    reader = Reader(changes, seed, 2, length)
    got, _ = reader.in_pieces(list(range(min(prompt, length), length)))
    torch.testing.assert_close(got, reader.full(), **CLOSE)


@pytest.mark.parametrize("length", [31, 63])
@pytest.mark.parametrize("update", ["chunk", "token"])
@pytest.mark.parametrize("wiring", ["stacked", "parallel"])
@pytest.mark.parametrize("fading", ["selective", "scalar_decay"])
def test_three_ways_agree_in_float32(fading, wiring, update, length):
    """At lengths that no chunk divides, to 1e-5 of the largest logit."""
    changes = {
        "wiring": wiring, "memory_update": update, "window": 8, "num_eidetic_tokens": 6,
        "hidden_size": 32, "state_size": 16, "position": "rope", "fading": fading,
        "ssm_head_dim": 16,
    }  # fmt: skip
    reader = Reader(changes, 0, 2, length, torch.float32)
    want = reader.full()
    for cuts in ([length // 2], list(range(7, length, 7)), list(range(1, length))):
        error = (reader.in_pieces(cuts)[0] - want).abs().max() / want.abs().max()
        assert error < 1e-5, (cuts, float(error))


@settings(max_examples=40)
@given(
    MODELS, st.lists(st.integers(1, 14), min_size=2, max_size=3), st.sampled_from("LR"),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_padding_is_invisible(changes, lengths, side, fixed_steps, seed):
    """Padded rows give what each gives alone, then decode on as each does alone."""
    more, columns = 3, max(lengths)
    reader = Reader(changes, seed, len(lengths), columns + more)
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "L" else mask
    padded, scores = torch.full(mask.shape, 3), torch.full(mask.shape, 9.0)
    for i, n in enumerate(lengths):
        padded[i, mask[i]], scores[i, mask[i]] = reader.tokens[i, :n], reader.scores[i, :n]
    logits, cache = reader.read(padded, scores, None, mask.long())
    other_pads = reader.read(padded.where(mask, 5), scores.where(mask, -9.0), None, mask)[0]
    torch.testing.assert_close(other_pads[mask], logits[mask], rtol=0, atol=1e-12)
    rows = [logits[i][mask[i]] for i in range(len(lengths))]
    at = torch.tensor(lengths)[:, None]
    for step in [0, 1, 2] if fixed_steps else [slice(0, more)]:
        column = at + torch.arange(more)[step]
        new, cache = reader.read(
            reader.tokens.gather(1, column), reader.scores.gather(1, column), cache
        )
        rows = [torch.cat(pair) for pair in zip(rows, new, strict=True)]
    for i, n in enumerate(lengths):
        torch.testing.assert_close(rows[i], reader.row(i, n + more), **CLOSE)


@settings(max_examples=30)
@given(MODELS, st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4),
       st.integers(0, 99))  # fmt: skip
def test_rows_may_advance_by_different_amounts(changes, pieces, seed):
    """In every piece each row reads its own number of tokens, the rest of its columns is pad."""
    totals = [sum(piece[i] for piece in pieces) for i in range(2)]
    reader = Reader(changes, seed, 2, max(totals))
    cache, rows, read = None, [[], []], [0, 0]
    for piece in pieces:
        columns = torch.arange(max(piece))
        mask = columns < torch.tensor(piece)[:, None]
        index = (torch.tensor(read)[:, None] + columns).clamp_max(max(totals) - 1)
        logits, cache = reader.read(
            reader.tokens.gather(1, index), reader.scores.gather(1, index), cache, mask.long()
        )
        for i in range(2):
            rows[i].append(logits[i, : piece[i]])
            read[i] += piece[i]
    assert cache.position.tolist() == totals
    for i in range(2):
        torch.testing.assert_close(torch.cat(rows[i]), reader.row(i, totals[i]), **CLOSE)


def test_no_pad_enters_a_memory():
    lengths, columns = [2, 9, 14], 14
    reader = Reader({"num_eidetic_tokens": 6, "store_in_window": True}, 0, 3, columns)
    mask = torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]
    _, cache = reader.read(reader.tokens, reader.scores, None, mask.long())
    for state in cache.states:
        best = state.memory.best
        for i, n in enumerate(lengths):
            held = best.score[i] > EMPTY
            positions = best.position[i][held].tolist()
            assert held.sum() == min(6, n)
            assert positions == sorted(set(positions)) and max(positions) < n


@settings(max_examples=15)
@given(MODELS, st.integers(1, 25), st.integers(0, 99))
def test_empty_memories_make_bmojo_equal_bmojo_f(changes, length, seed):
    """Exactly: a memory that holds nothing takes no part in the softmax."""
    changes = {**changes, "layer_types": ["bmojo", "bmojo"]}
    full = peaky.model(seed=seed, **{**changes, "num_eidetic_tokens": 4, "selection": "oracle"})
    fading = peaky.model("bmojo_f", seed=seed, **changes)
    none = peaky.model(seed=seed, **{**changes, "num_eidetic_tokens": 0})
    for model in (fading, none):  # m_f = m_e = 0 has no memory projections to load
        missing, _ = model.load_state_dict(full.state_dict(), strict=False)
        assert not missing
    tokens = peaky.ids(2, length, seed)
    want = peaky.logits(fading, tokens)
    assert torch.equal(peaky.logits(none, tokens), want)
    never = torch.full(tokens.shape, EMPTY)
    got = peaky.logits(full, tokens, memory_scores=never)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    chosen = peaky.logits(full, tokens, memory_scores=torch.rand(tokens.shape))
    first = 0 if changes["memory_update"] == "token" else full.config.memory_chunk
    torch.testing.assert_close(chosen[:, :first], want[:, :first], rtol=0, atol=1e-12)
    if length > 2 * first + changes["window"] + 2:
        assert (chosen - want).abs().max() > 1e-6


def test_bmojo_without_memory_tokens_is_the_hybrid():
    """Stacked, m_f = m_e = 0: a selective SSM, then sliding-window attention."""
    hybrid = peaky.model("hybrid", window=4)
    bare = peaky.model(window=4, num_fading_tokens=0, num_eidetic_tokens=0)
    names = {"ssm_norm": (0, "norm"), "ssm": (0, "inner"), "attention_norm": (1, "norm")}
    weights = {}
    for name in bare.state_dict():
        head, _, rest = name.partition("model.layers.")
        if rest:
            block, part, *leaf = rest.split(".")
            offset, target = names.get(part, (1, "inner"))
            rest = ".".join(["model.layers", str(2 * int(block) + offset), target, *leaf])
            weights[name] = hybrid.state_dict()[rest]
        else:
            weights[name] = hybrid.state_dict()[head]
    bare.load_state_dict(weights)
    tokens = peaky.ids(2, 30)
    torch.testing.assert_close(peaky.logits(bare, tokens), peaky.logits(hybrid, tokens), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fading", ["selective", "scalar_decay"])
def test_every_kind_is_one_function_with_a_state_of_one_size(kind, fading):
    reader = Reader({"kind": kind, "fading": fading}, 1, 2, 40)
    sizes = [reader.read(reader.tokens[:, :3], None, None)[1].nbytes]
    for cuts in ([20], [*range(3, 40, 5)], [*range(30, 40)]):
        got, cache = reader.in_pieces(cuts)
        torch.testing.assert_close(got, reader.full(), **CLOSE)
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1


def test_only_full_attention_grows():
    reader = Reader({"kind": "transformer", "window": None}, 1, 2, 40)
    torch.testing.assert_close(reader.in_pieces([9, 20, 21])[0], reader.full(), **CLOSE)
    sizes = [reader.read(reader.tokens[:, :n], None, None)[1].nbytes for n in (3, 40)]
    assert sizes[1] > 10 * sizes[0]


@torch.no_grad()
def test_pads_do_not_lengthen_a_text():
    """Rotary positions of type "dynamic" reach 12 tokens of each text, however wide the batch."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    model = peaky.model("hybrid", position="rope", rope_parameters=rope, max_position_embeddings=12)
    tokens, mask = peaky.ids(2, 19), torch.ones(2, 19, dtype=torch.long)
    mask[0, :8] = mask[1, :10] = 0
    out = model(tokens, attention_mask=mask, use_cache=True)
    alone = model(tokens[1:, 10:], use_cache=False).logits
    torch.testing.assert_close(out.logits[1:, 10:], alone)
    state = out.past_key_values
    model(tokens[:, :1], past_key_values=state)  # 12 and 10 tokens now
    with pytest.raises(ValueError, match="longer than max_position_embeddings 12 .* got 13 tokens"):
        model(tokens[:, :1], past_key_values=state)
