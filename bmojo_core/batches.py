"""How a batch enters the model and leaves it: padding, packed documents, and what is refused.

    columns    (b, l)    tokens and pads as the caller gives them; one or several documents a row
    rows       (n, r)    one document a row, its tokens in columns 0 .. n_i - 1, then pads

The model reads rows only.  Documents therefore cannot see each other, and a pad, which always
comes after a row's last token, can reach nothing.

Symbols: b batch, l columns, n rows, r columns of the longest row, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from bmojo_core.config import BMojoConfig

IGNORED = -100  # label of a column that is not scored (torch's convention)


@dataclass(frozen=True)
class Rows:
    """Where the columns of a batch go, and the way back.

    Attributes
    ----------
    source
        For every place of the rows, the flattened column that it holds.
    target
        For every column, the flattened place of the rows that answers it.
    lengths
        Tokens of each row.
    scored
        Columns whose token has a predecessor in its document, right before it: only those are
        predicted.
    packed
        Whether rows are documents that shared a column range, so that n is not b.
    """

    source: Int[Tensor, "n r"]
    target: Int[Tensor, "b l"]
    lengths: Int[Tensor, "n"]
    scored: Bool[Tensor, "b l"]
    packed: bool

    def pack(self, x: Shaped[Tensor, "b l *d"]) -> Shaped[Tensor, "n r *d"]:
        """Columns to rows."""
        return _flat_take(x, self.source)

    def unpack(self, x: Shaped[Tensor, "n r *d"]) -> Shaped[Tensor, "b l *d"]:
        """Rows to columns; what stands at a pad has no meaning."""
        return _flat_take(x, self.target)


def _flat_take(x: Tensor, index: Tensor) -> Tensor:
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def rows_of_mask(valid: Bool[Tensor, "b l"]) -> Rows:
    """One row a batch entry: its tokens move to the left, its pads to the right."""
    b, l = valid.shape
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    offset = torch.arange(b, device=valid.device)[:, None] * l
    scored = valid & (valid.cumsum(1) > 1) & _after_token(valid)
    return Rows(order + offset, order.argsort(dim=1) + offset, valid.sum(1), scored, False)


def rows_of_documents(starts: Bool[Tensor, "b l"], valid: Bool[Tensor, "b l"]) -> Rows:
    """One row a document; ``starts`` marks the first column of each, which may be a pad."""
    columns = valid.flatten().nonzero().squeeze(1)
    label = starts.flatten().cumsum(0)[columns]
    first_token = torch.ones_like(label, dtype=torch.bool)
    first_token[1:] = label[1:] != label[:-1]
    document = first_token.cumsum(0) - 1
    lengths = document.bincount()
    first = lengths.cumsum(0) - lengths
    longest = int(lengths.max())
    place = torch.arange(columns.shape[0], device=columns.device) - first[document]
    place = place + document * longest
    source = columns.new_zeros(lengths.shape[0] * longest)
    target = columns.new_zeros(valid.numel())
    source[place], target[columns] = columns, place
    shaped = source.view(-1, longest), target.view(valid.shape)
    scored = torch.zeros_like(valid.flatten())
    scored[columns[~first_token]] = True
    return Rows(*shaped, lengths, scored.view(valid.shape) & _after_token(valid), True)


def _after_token(valid: Bool[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
    """Columns whose left neighbour is a token, too: its logits are what the loss reads.

    A pad is answered behind all tokens of its row, so after a hole they would know the label.
    """
    after = torch.zeros_like(valid)
    after[:, 1:] = valid[:, :-1]
    return after


def after_gap(kept: Int[Tensor, "k"]) -> Bool[Tensor, "k"]:
    """Kept columns whose left neighbour is not kept: the logits that predict them are not there."""
    gap = torch.zeros_like(kept, dtype=torch.bool)
    gap[1:] = kept[1:] != kept[:-1] + 1
    return gap


def find_rows(
    shape: tuple[int, int],
    mask: Shaped[Tensor, "b L"] | None,
    position_ids: Int[Tensor, "#b l"] | None,
    cu_seqlens: Int[Tensor, "n"] | None,
    read: Int[Tensor, "b"] | None,
) -> Rows | None:
    """The rows that mask, positions or document boundaries ask for; None: columns are rows.

    Parameters
    ----------
    shape
        (b, l) of the batch.
    mask
        Nonzero at tokens (b, l), or (b, columns read before + l).
    position_ids
        Position of each token in its document; where it returns to 0 a new document begins.
    cu_seqlens
        Boundaries 0 = s_0 < s_1 < .. < s_n = l of the documents of a batch of one row.
    read
        Tokens read before (b,), None at the start.

    Raises
    ------
    ValueError
        For a wrong shape, a row without tokens, positions that do not count from 0 in every
        document (or on from what was read), boundaries that are no partition.
    """
    valid = None if mask is None else _valid(shape, mask)
    if cu_seqlens is not None:
        if position_ids is not None:
            raise ValueError("give at most one of position_ids and cu_seqlens")
        starts = _starts_of_boundaries(shape, cu_seqlens)
    elif position_ids is not None:
        starts = _starts_of_positions(shape, position_ids, valid, read)
    else:
        starts = None
    if starts is not None:
        everywhere = torch.ones(shape, dtype=torch.bool, device=starts.device)
        return rows_of_documents(starts, everywhere if valid is None else valid)
    return None if valid is None else rows_of_mask(valid)


def _valid(shape: tuple[int, int], mask: Tensor) -> Bool[Tensor, "b l"] | None:
    b, l = shape
    if mask.ndim != 2 or mask.shape[0] != b or mask.shape[1] < l:
        raise ValueError(f"attention_mask must be (b, l) = {(b, l)}, got {tuple(mask.shape)}")
    valid = mask[:, mask.shape[1] - l :] != 0
    if not torch.compiler.is_compiling():
        if bool(valid.all()):
            return None
        if not bool(valid.any(1).all()):
            raise ValueError("attention_mask must leave at least one token in every row")
    return valid


def _starts_of_positions(
    shape: tuple[int, int], position_ids: Tensor, valid: Tensor | None, read: Tensor | None
) -> Bool[Tensor, "b l"] | None:
    """First tokens of documents; None when every row is one document (or goes on with one)."""
    if position_ids.ndim != 2 or tuple(position_ids.shape) not in (shape, (1, shape[1])):
        raise ValueError(f"position_ids must be (b, l) = {shape}, got {tuple(position_ids.shape)}")
    at = position_ids.expand(shape)
    valid = torch.ones_like(at, dtype=torch.bool) if valid is None else valid
    starts = (at == 0) & valid
    count = valid.cumsum(1) - 1
    begin = torch.where(starts, count, -1).cummax(1).values  # where the present document began
    before = torch.zeros(shape[0], 1, dtype=count.dtype, device=at.device)
    before = before if read is None else read[:, None]
    expected = torch.where(begin > 0, count - begin, count + before)
    if bool((valid & (at != expected)).any()):
        raise ValueError(
            "position_ids must count 0, 1, 2, .. in every document, or on from the tokens read "
            f"before; got {position_ids.tolist()[0][:12]} .. in the first row"
        )
    if int(starts.sum(1).max()) <= 1 and bool((begin <= 0).all()):
        return None
    if read is not None:
        raise ValueError("position_ids must not begin new documents after past_key_values")
    return starts


def _starts_of_boundaries(shape: tuple[int, int], cu_seqlens: Tensor) -> Bool[Tensor, "1 l"]:
    edges = cu_seqlens.tolist()
    whole = shape[0] == 1 and cu_seqlens.ndim == 1 and edges[:1] == [0] and edges[-1] == shape[1]
    if not whole or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to l = {shape[1]} for a batch of one row, got {edges} "
            f"for a batch of {shape[0]}"
        )
    starts = torch.zeros(shape, dtype=torch.bool, device=cu_seqlens.device)
    starts[0, cu_seqlens[:-1].long()] = True
    return starts


# -- what is refused ------------------------------------------------------------------------------


def check_tokens(
    config: BMojoConfig,
    input_ids: Shaped[Tensor, "*i"] | None,
    inputs_embeds: Shaped[Tensor, "*e"] | None,
) -> None:
    """Exactly one of ids and embeddings: a tensor, not empty, in the vocabulary, finite.

    Values are looked at on the CPU only: on an accelerator that would wait for the device.

    Raises
    ------
    ValueError
        Otherwise.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    name, x, axes = ("input_ids", input_ids, "(b, l)")
    if input_ids is None:
        name, x, axes = "inputs_embeds", inputs_embeds, f"(b, l, {config.hidden_size})"
    _check_tensor(name, x)
    if x.ndim != axes.count(",") + 1 or 0 in x.shape[:2] or (
        input_ids is None and x.shape[2] != config.hidden_size
    ):  # fmt: skip
        raise ValueError(
            f"{name} must be {axes} with b >= 1 and l >= 1, got shape {tuple(x.shape)}"
        )
    if input_ids is not None and x.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, got {x.dtype}")
    if input_ids is None and not x.is_floating_point():
        raise ValueError(f"inputs_embeds must be of a floating dtype, got {x.dtype}")
    if not _can_look(x):
        return
    if input_ids is None:
        if not bool(x.isfinite().all()):
            raise ValueError("inputs_embeds must be finite, got NaN or infinity")
    else:
        _check_range("input_ids", x, config.vocab_size)


def check_labels(config: BMojoConfig, labels: Tensor, shape: tuple[int, int]) -> None:
    """Labels (b, l), a tensor: tokens of the vocabulary, or -100 where not scored.

    Raises
    ------
    ValueError
        Otherwise.
    """
    _check_tensor("labels", labels)
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"labels must be (b, l) = {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if _can_look(labels):
        _check_range("labels", labels.masked_fill(labels == IGNORED, 0), config.vocab_size)


def check_scores(scores: Tensor | None, shape: tuple[int, int]) -> None:
    """Scores (b, l) of a floating dtype, without NaN.

    Raises
    ------
    ValueError
        Otherwise.
    """
    if scores is None:
        return
    if tuple(scores.shape) != tuple(shape) or not scores.is_floating_point():
        given = f"{tuple(scores.shape)} of {scores.dtype}"
        raise ValueError(f"memory_scores must be floating (b, l) = {tuple(shape)}, got {given}")
    if _can_look(scores) and bool(scores.isnan().any()):
        raise ValueError("memory_scores must not be NaN")


def check_output(h: Float[Tensor, "b l d"], named_parameters: Any) -> None:
    """Hidden states must be finite; says which weight is not.

    Raises
    ------
    ValueError
        For NaN or infinity.
    """
    if not _can_look(h) or bool(h.isfinite().all()):
        return
    broken = [name for name, p in named_parameters if not bool(p.isfinite().all())]
    where = f"weights {broken[:3]} hold NaN or infinity" if broken else "an activation overflowed"
    raise ValueError(f"the model's output must be finite, got NaN or infinity: {where}")


def _check_tensor(name: str, x: Any) -> None:
    """Before anything else is asked: a NumPy array's int64 would be refused as no int64."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a torch tensor, got {type(x).__name__}")


def _check_range(name: str, ids: Tensor, vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} must be in 0..{vocab_size - 1} (vocab_size {vocab_size}), "
            f"got values from {low} to {high}"
        )


def _can_look(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
