"""What one forward pass has to do: products, exponentials and bytes, counted from the sizes.

    flops         2 for every product of two matrix elements, attention's scores and values too
    exponentials  one for each (channel, state, position) of a scan, one for each (head, query,
                  visible key), one for each element of an activation or a softplus
    bytes         every operation reads its inputs once and writes its outputs once

Bytes are those of the library's fused operations: a norm, a product, a convolution with its
activation, a scan with its gate and attention with its softmax are one operation each.  Nothing
smaller is possible without fusing further; nothing is said of what a machine makes of it.

Symbols
-------
b, l, d    rows, length, width                 e, n, r   SSM channels, states, rank of delta
h, g, p    heads, key-value heads, head width  f         width of the MLP
w, c       window, chunk                       m_f, m_e  fading and eidetic tokens
"""

from __future__ import annotations

from dataclasses import dataclass

from bmojo_core.config import BMojoConfig


@dataclass(frozen=True)
class Work:
    """What a pass has to do.

    Attributes
    ----------
    product_flops
        Products with weights, 2 flops an element pair.
    attention_flops
        Products of queries with keys and of weights with values.
    scan_steps
        Updates of one state of one channel: four operations and, where every state has its own
        decay, an exponential each.
    exponentials
        All of them: scans, softmax, activations, softplus.
    bytes
        Read and written.
    """

    product_flops: int = 0
    attention_flops: int = 0
    scan_steps: int = 0
    exponentials: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        mine, theirs = vars(self), vars(other)
        return Work(**{name: mine[name] + theirs[name] for name in mine})


def product(tokens: int, inputs: int, outputs: int, size: int = 2) -> Work:
    """(tokens, inputs) times (inputs, outputs); ``size`` bytes an element."""
    elements = tokens * inputs + inputs * outputs + tokens * outputs
    return Work(product_flops=2 * tokens * inputs * outputs, bytes=size * elements)


def elementwise(read: int, written: int, exponentials: int = 0, size: int = 2) -> Work:
    """An operation that reads and writes so many elements."""
    return Work(exponentials=exponentials, bytes=size * (read + written))


def visible_in_window(length: int, window: int | None) -> int:
    """Pairs (query, key) with key <= query < key + window, over a sequence; None: no window."""
    w = length if window is None else min(window, length)
    return w * (w + 1) // 2 + (length - w) * w


def visible_in_memory(c: BMojoConfig, length: int) -> int:
    """Pairs (query, memory token that holds something), over a sequence read from its beginning.

    Chunk i sees min(m_e, i c) eidetic tokens, and those fading tokens whose output exists.  For
    ``memory_update="chunk"`` and tokens stored at once, the defaults.

    Raises
    ------
    ValueError
        For other settings, which this count does not know.
    """
    if c.memory_update != "chunk" or not c.store_in_window:
        raise ValueError(
            "counts know memory_update 'chunk' with store_in_window only, "
            f"got {c.memory_update!r} and {c.store_in_window}"
        )
    pairs = 0
    for begin in range(0, length, c.memory_chunk):
        queries = min(c.memory_chunk, length - begin)
        fading = min(c.num_fading_tokens, -(-begin // c.fading_stride))
        pairs += queries * (fading + min(c.num_eidetic_tokens, begin))
    return pairs


def attention_core(c: BMojoConfig, rows: int, length: int, pairs: int, memory: int) -> Work:
    """Softmax attention of so many (query, key) pairs a row, over ``memory`` tokens beside l."""
    heads, groups = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    elements = length * 2 * heads + 2 * groups * (length + memory)  # q, out; k, v
    return Work(
        attention_flops=4 * rows * heads * pairs,
        exponentials=rows * c.num_heads * pairs,
        bytes=2 * rows * elements,
    )


def scan(c: BMojoConfig, rows: int, length: int) -> Work:
    """The scan with softplus and gate: reads u, delta, z, B, C, writes y.

    Decays: one a channel and state, or (``fading="scalar_decay"``) one a head.
    """
    e, n, tokens = c.ssm_intermediate_size, c.state_size, rows * length
    steps = _step_sizes(c)
    decays = steps if c.fading == "scalar_decay" else e * n
    return Work(
        scan_steps=tokens * e * n,
        exponentials=tokens * (decays + steps + e),  # with those of the softplus and the gate
        bytes=2 * tokens * (3 * e + steps + 2 * n),
    )


def _step_sizes(c: BMojoConfig) -> int:
    """Step sizes a token: one a channel or one a head."""
    e = c.ssm_intermediate_size
    return e // c.ssm_head_dim if c.fading == "scalar_decay" else e


def core(c: BMojoConfig, kind: str, rows: int, length: int) -> Work:
    """Of a sublayer, what mixes positions: its scan, its attention, its reading of innovation.

    Where these operations are priced by their own times, their bytes are in the price.
    """
    if kind == "mamba":
        return scan(c, rows, length)
    if kind in ("attention", "sliding_attention"):
        window = c.window if kind == "sliding_attention" else None
        return attention_core(c, rows, length, visible_in_window(length, window), 0)
    if kind == "bmojo":
        memory = -(-length // c.memory_chunk) * (c.num_fading_tokens + c.num_eidetic_tokens)
        pairs = visible_in_window(length, c.window) + visible_in_memory(c, length)
        read = rows * length * c.hidden_size if c.num_eidetic_tokens else 0  # y, for innovation
        attention = attention_core(c, rows, length, pairs, memory)
        return scan(c, rows, length) + attention + elementwise(read, 0)
    return Work()


def sublayer(c: BMojoConfig, kind: str, rows: int, length: int) -> Work:
    """One residual sublayer with its norm and its addition to the stream, in bfloat16.

    Raises
    ------
    ValueError
        For a sublayer that is not counted (``moe``: its work depends on the routing).
    """
    t, d = rows * length, c.hidden_size
    residual = elementwise(t * d, t * d) + elementwise(2 * t * d, t * d)  # norm; h + f
    if kind == "mamba":
        return residual + _ssm(c, t) + core(c, kind, rows, length)
    if kind in ("attention", "sliding_attention"):
        return residual + _projections(c, t) + core(c, kind, rows, length)
    if kind == "feedforward":
        f = c.intermediate_size
        gate = elementwise(t * f, t * f, exponentials=t * f) + elementwise(2 * t * f, t * f)
        return residual + product(t, d, f) + product(t, d, f) + gate + product(t, f, d)
    if kind == "bmojo":
        both = residual if c.wiring == "parallel" else residual + residual
        around = _ssm(c, t) + _projections(c, t) + _memory(c, rows, length)
        return both + around + core(c, kind, rows, length)
    raise ValueError(
        "sublayer must be 'mamba', 'attention', 'sliding_attention', 'feedforward' or 'bmojo', "
        f"got {kind!r}"
    )


def forward(c: BMojoConfig, rows: int, length: int) -> Work:
    """All sublayers and the final norm; the embedding and the head are left out.

    Timings that ask for the last position's logits only have next to nothing of those.
    """
    t, d = rows * length, c.hidden_size
    total = elementwise(t * d, t * d)
    for kind in c.layer_types:
        total = total + sublayer(c, kind, rows, length)
    return total


def _ssm(c: BMojoConfig, t: int) -> Work:
    """Maps and convolution around the scan."""
    d, e = c.hidden_size, c.ssm_intermediate_size
    r, n = c.dt_rank, c.state_size
    maps = (
        product(t, d, 2 * e)
        + product(t, e, r + 2 * n)
        + product(t, r, _step_sizes(c))
        + product(t, e, d)
    )
    convolution = elementwise(t * e, t * e, exponentials=t * e)
    return maps + convolution


def _projections(c: BMojoConfig, tokens: int) -> Work:
    d, heads, groups = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    keys = product(tokens, d, groups)
    return product(tokens, d, heads) + keys + keys + product(tokens, heads, d)


def _memory(c: BMojoConfig, rows: int, length: int) -> Work:
    """Eidetic tokens gathered, fading ones normed and projected."""
    d, groups = c.hidden_size, c.num_kv_heads * c.head_dim
    chunks = rows * -(-length // c.memory_chunk)
    gathered, fading = 2 * chunks * c.num_eidetic_tokens * groups, chunks * c.num_fading_tokens
    total = elementwise(gathered, gathered)
    if fading:
        norm = elementwise(fading * d, fading * d) if c.normalize_fading else Work()
        total = total + norm + product(fading, d, groups) + product(fading, d, groups)
    return total
