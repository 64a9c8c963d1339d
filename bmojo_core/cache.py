"""The state of a model between two calls: all that is remembered, of constant size.

A B'MOJO block carries, for each row (elements; their bytes in ``state_bytes``):

    (k-1) e + e n        convolution tail and SSM state          fading memory
    2 w g p              ring of keys and values                 window
    2 m g p + 3 m        memory of the chunk being read          m = m_f + m_e
    2 m_e g p + 2 m_e    the best tokens so far, their scores and positions
    s d (+ g p)          last SSM outputs (sum of keys, where the policy needs it)
    r (2 g p + 2)        tokens too recent to be stored (r = 0 if in-window ones may be)
    (k'-1) d             tail of the key convolution, if there is one

Nothing grows with what has been read; only full ``attention`` sublayers, which a B'MOJO does not
have, keep everything.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bmojo_core.config import BMojoConfig
from bmojo_core.layers.attention import Growing, Register
from bmojo_core.layers.bmojo import BMojoState
from bmojo_core.layers.eidetic import (
    EideticState,
    InUse,
    Tokens,
    needs_key_sum,
    outputs_needed,
    storing_delay,
)
from bmojo_core.layers.mamba import SSMState

FORMAT = "bmojo state 2"
WIDE = ("x", "key_sum")  # fields that are kept in float32 at least
PARTS = {
    part.__name__: part
    for part in (BMojoState, EideticState, Growing, InUse, Register, SSMState, Tokens)
}


class BMojoCache:
    """States of all sublayers and how many tokens each row has read.

    Attributes
    ----------
    states
        One named tuple of tensors a sublayer (None for sublayers without memory).
    position
        Tokens read by each row (b,), or None before the first call.
    columns
        Columns read, pads included: what transformers calls the length of a cache.
    """

    is_compileable = False  # transformers asks; only its static caches are
    is_linear = ()  # nor are there layers by whose columns transformers would cut a prompt

    def __init__(
        self, states: list[Any] | None = None, position: Tensor | None = None, columns: int = 0
    ) -> None:
        self.states = states
        self.position = position
        self.columns = columns
        self._shared = False
        self._fits: BMojoConfig | None = None  # what it was last checked against

    def __repr__(self) -> str:
        read = None if self.position is None else self.position.tolist()
        return f"BMojoCache(tokens read: {read}, bytes: {self.nbytes})"

    def is_empty(self) -> bool:
        """Whether nothing has been read yet."""
        return self.position is None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, pads included (transformers' name for it)."""
        return self.columns

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the state."""
        if self.position is not None:
            yield self.position
        yield from (leaf for _, leaf in leaves("", self.states or []))

    @property
    def nbytes(self) -> int:
        """Bytes held, over all rows and sublayers; ``state_bytes`` says how many to expect."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    # -- what the model does with it --------------------------------------------------------------

    def check(self, batch: int, config: BMojoConfig) -> None:
        """Whether a batch of so many rows, in a model of that configuration, can go on from here.

        Raises
        ------
        ValueError
            If not; names the first part that does not fit.
        """
        if self.position is None:
            return
        if self.position.shape[0] != batch:
            rows = self.position.shape[0]
            raise ValueError(f"past_key_values holds {rows} rows, the batch has {batch}")
        if self._fits is config:
            return
        if len(self.states) != len(config.layer_types):
            raise ValueError(
                f"past_key_values holds {len(self.states)} sublayers, the model has "
                f"{len(config.layer_types)}"
            )
        held = {name: tuple(t.shape[1:]) for name, t in leaves("", self.states)}
        needed = row_shapes(config)
        for name in needed | held:
            if not _alike(held.get(name), needed.get(name)):
                raise ValueError(
                    f"past_key_values must be of the model's configuration: {name} holds "
                    f"{held.get(name)} a row, the model needs {needed.get(name)}"
                )
        self._fits = config

    def advance(
        self, states: list[Any], columns: int, lengths: Int[Tensor, "b"] | None,
        h: Float[Tensor, "b l d"],
    ) -> None:  # fmt: skip
        """Take the states after ``columns`` more columns, ``lengths`` of them tokens (or all).

        ``h`` is what was read: a stack without any memory has rows, too.
        """
        if self.position is None:
            self.position = torch.zeros(h.shape[0], dtype=torch.long, device=h.device)
        self.position = self.position + (columns if lengths is None else lengths)
        self.columns += columns
        self.states = states

    def own(self) -> None:
        """Make sure that writing here is seen by no fork, and allowed: copy what is not ours.

        What was made in inference mode may be written in inference mode only.
        """
        kept = self.position is not None and self.position.is_inference()
        if self._shared or (kept and not torch.is_inference_mode_enabled()):
            self._take(self.map(Tensor.clone))

    # -- copies, beams, places --------------------------------------------------------------------

    def map(self, function: Callable[[Tensor], Tensor]) -> BMojoCache:
        """A cache of ``function(tensor)`` for every tensor."""
        return self._map(lambda _, t: function(t))

    def fork(self) -> BMojoCache:
        """A second cache that goes on from here; tensors are shared until one of the two writes."""
        return self._sharing(lambda _, t: t)

    def detach(self) -> BMojoCache:
        """The same values without their history: truncated backpropagation (appendix B.2)."""
        return self._sharing(lambda _, t: t.detach())

    def to(self, *args: Any, **kwargs: Any) -> BMojoCache:
        """Move to a device; keys, values, outputs and tails also take a dtype given.

        SSM states and sums of keys stay in float32 at least, scores in float32.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)

        def move(field: str, t: Tensor) -> Tensor:
            if dtype is None or field == "score" or not t.is_floating_point():
                return t.to(device=device)
            wide = torch.promote_types(dtype, torch.float32)
            return t.to(device=device, dtype=wide if field in WIDE else dtype)

        return self._sharing(move)

    def select(self, rows: Int[Tensor, "n"]) -> BMojoCache:
        """The states of the given rows (n,), which may repeat: beams, or a smaller batch."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def reorder_cache(self, beam_idx: Int[Tensor, "b"]) -> None:
        """Rows take the states of ``beam_idx``, in place (transformers' beam search)."""
        self._take(self.select(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, in place (transformers' beam search)."""
        self._take(self.map(lambda t: t.repeat_interleave(repeats, dim=0)))

    def batch_select_indices(self, indices: Int[Tensor, "n"]) -> None:
        """Keep the given rows, in place (transformers' name for it)."""
        self._take(self.select(indices))

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> BMojoCache:
        position = None if self.position is None else function("position", self.position)
        return BMojoCache(_map(function, "", self.states), position, self.columns)

    def _sharing(self, function: Callable[[str, Tensor], Tensor]) -> BMojoCache:
        twin = self._map(function)
        self._shared = twin._shared = True
        return twin

    def _take(self, other: BMojoCache) -> None:
        self.states, self.position, self._shared = other.states, other.position, False

    # -- on disk ----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file, whole or not at all.

        Raises
        ------
        ValueError
            When nothing has been read yet.
        OSError
            When the file cannot be written; a previous one stays as it was.
        """
        if self.position is None:
            raise ValueError("the state to be saved must have read at least one token, got none")
        tensors = {"position": self.position.contiguous()}
        tensors |= {name: t.detach().contiguous() for name, t in leaves("", self.states)}
        metadata = {
            "format": FORMAT, "columns": str(self.columns), "tree": json.dumps(_tree(self.states)),
            "checksum": _checksum(tensors),
        }  # fmt: skip
        part = Path(f"{path}.part")
        try:
            save_file(tensors, part, metadata)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> BMojoCache:
        """Read a state that ``save`` wrote.

        Raises
        ------
        ValueError
            When the file is cut, altered, or something else.
        FileNotFoundError
            When there is none.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole saved state: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} must hold a {FORMAT!r}, got {metadata.get('format')!r}")
        if metadata["checksum"] != _checksum(tensors):
            raise ValueError(f"{path} was altered since it was saved: its checksum does not match")
        states = _build("", json.loads(metadata["tree"]), tensors)
        return cls(states, tensors["position"], int(metadata["columns"]))


def state_bytes(
    config: BMojoConfig, batch: int = 1, dtype: torch.dtype = torch.float32, read: int = 0
) -> int:
    """Bytes of the state of a model: the table above, times rows, sublayers and element sizes.

    Parameters
    ----------
    config, batch, dtype
        The model, rows of the batch, and dtype of the weights.
    read
        Columns read; they matter to full ``attention`` sublayers only.

    Returns
    -------
    int
        What ``BMojoCache.nbytes`` is.
    """
    one = dtype.itemsize
    size = {"score": 4, "position": 8, "valid": 1} | dict.fromkeys(WIDE, max(one, 4))
    shapes = row_shapes(config, read)
    held = sum(math.prod(s) * size.get(name.split(".")[-1], one) for name, s in shapes.items())
    return batch * (size["position"] + held)


def row_shapes(config: BMojoConfig, read: int | None = None) -> dict[str, tuple[int | None, ...]]:
    """The table above: the shape of every part of one row's state, by its dotted name.

    ``read`` is the length of what grows (full attention); None stands for any.
    """
    g, p, d = config.num_kv_heads, config.head_dim, config.hidden_size
    m_e, e = config.num_eidetic_tokens, config.ssm_intermediate_size
    m, w = config.num_fading_tokens + m_e, config.window
    ssm = {"tail": (config.conv_kernel - 1, e), "x": (e, config.state_size)}

    def pair(*shape: int | None) -> dict[str, Any]:
        return {"k": shape, "v": shape}

    def tokens(s: int) -> dict[str, Any]:
        return pair(s, g, p) | {"score": (s,), "position": (s,)}

    memory = {
        "current": {"valid": (m,), "position": (m,), "score": (m,)},
        "best": tokens(m_e),
        "waiting": tokens(storing_delay(config)),
        "outputs": (outputs_needed(config), d),
    } | ({"key_sum": (g, p)} if needs_key_sum(config) else {})
    tail = (max(config.key_kernel - 1, 0), d)
    sublayer = {
        "mamba": ssm,
        "sliding_attention": pair(g, w, p),
        "attention": pair(read, g, p) | {"valid": (read,)},
        "bmojo": {"ssm": ssm, "window": pair(g, m + w, p), "memory": memory, "tail": tail},
    }
    stack = {str(i): sublayer.get(kind, {}) for i, kind in enumerate(config.layer_types)}
    return dict(_flat("", stack))


def _flat(name: str, tree: Any) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    if isinstance(tree, tuple):
        yield name, tree
        return
    for field, branch in tree.items():
        yield from _flat(f"{name}.{field}" if name else field, branch)


def _alike(held: tuple[int, ...] | None, needed: tuple[int | None, ...] | None) -> bool:
    """The same sizes, where a size is asked for."""
    if held is None or needed is None or len(held) != len(needed):
        return False
    return all(want is None or have == want for have, want in zip(held, needed, strict=True))


def leaves(name: str, tree: Any) -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of every tensor of nested lists and named tuples."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, list):
        for i, branch in enumerate(tree):
            yield from leaves(str(i), branch)
    elif tree is not None:
        for field, branch in zip(tree._fields, tree, strict=True):
            yield from leaves(f"{name}.{field}", branch)


def _map(function: Callable[[str, Tensor], Tensor], field: str, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(field, tree)
    if isinstance(tree, list):
        return [_map(function, field, branch) for branch in tree]
    if tree is None:
        return None
    fields = zip(tree._fields, tree, strict=True)
    return type(tree)(*(_map(function, name, branch) for name, branch in fields))


def _tree(tree: Any) -> Any:
    """The names of the parts, as JSON: all that a file of tensors does not say."""
    if isinstance(tree, list):
        return [_tree(branch) for branch in tree]
    if isinstance(tree, tuple):
        return {type(tree).__name__: [_tree(branch) for branch in tree]}
    return None if tree is None else "tensor"


def _build(name: str, tree: Any, tensors: dict[str, Tensor]) -> Any:
    if tree is None or tree == "tensor":
        return None if tree is None else tensors[name]
    if isinstance(tree, list):
        return [_build(str(i), branch, tensors) for i, branch in enumerate(tree)]
    ((part, branches),) = tree.items()
    fields = zip(PARTS[part]._fields, branches, strict=True)
    return PARTS[part](*(_build(f"{name}.{field}", branch, tensors) for field, branch in fields))


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        t = tensors[name].cpu().contiguous()
        total = zlib.crc32(f"{name} {t.dtype} {tuple(t.shape)}".encode(), total)
        total = zlib.crc32(t.view(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"
