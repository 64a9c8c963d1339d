"""A page to click through a sequence: what each layer stored, when, and who looked at it.

One HTML file with its style, its script and its data inside; a content-security policy forbids it
to load anything.  Tokens are shaded by the rank of their innovation and underlined where they were
stored; a click on a token tells when it entered memory and when it was given up, which later
queries attended to it there, and where its own attention went.

Symbols: l length, n chunks.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from bmojo_core.inspect.trace import LayerTrace, memory_trace
from bmojo_core.modeling import BMojoForCausalLM

PLACEHOLDER = "@DATA@"
SMALLEST = 5e-5  # shares below half of a hundredth of a percent are not written


def memory_page(
    model: BMojoForCausalLM,
    input_ids: Int[Tensor, "*batch l"],
    tokens: Sequence[str],
    path: str | Path,
) -> Path:
    """Read one sequence and write the page; a file that was there is replaced whole or not at all.

    Parameters
    ----------
    model
        A model with at least one ``bmojo`` sublayer.
    input_ids
        One sequence: (l,) or (1, l).
    tokens
        What to show for each id (l strings).
    path
        The file to write; its folder must exist.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ValueError
        For more than one sequence, another number of tokens, or a model without B'MOJO layers.
    OSError
        When the file cannot be written.
    """
    if input_ids.ndim > 2 or (input_ids.ndim == 2 and input_ids.shape[0] != 1):
        raise ValueError(f"input_ids must be one sequence, (l,) or (1, l), got {input_ids.shape}")
    length = input_ids.shape[-1]
    if isinstance(tokens, str) or len(tokens) != length:
        raise ValueError(f"tokens must be a sequence of {length} strings, got {len(tokens)}")
    traces = memory_trace(model, input_ids.reshape(1, length))
    data = {"tokens": [str(t) for t in tokens], "layers": [layer_data(t) for t in traces]}
    template = files("bmojo_core.inspect").joinpath("page.html").read_text(encoding="utf-8")
    return _write_whole(Path(path), template.replace(PLACEHOLDER, embeddable_json(data), 1))


def layer_data(trace: LayerTrace, row: int = 0) -> dict[str, Any]:
    """What the page needs to know of one layer, as lists and numbers.

    Returns
    -------
    dict
        ``layer``, ``chunk``, ``window``; ``score`` (l) and ``rank`` (l), 0 the smallest; ``held``:
        [position, first chunk, chunk at which it was gone or null]; ``mass`` (l, 3); ``looked``:
        for each query [position, share] of the eidetic tokens it attended to.
    """
    score = trace.score[row].double().cpu().numpy()
    rank = np.argsort(np.argsort(score, kind="stable"))
    position, valid = trace.position[row].tolist(), trace.valid[row].tolist()
    looked = []
    for query, shares in enumerate(trace.eidetic_mass[row].tolist()):
        n = query // trace.chunk
        looked.append([
            [at, round(share, 4)]
            for at, here, share in zip(position[n], valid[n], shares, strict=True)
            if here and share >= SMALLEST
        ])  # fmt: skip
    return {
        "layer": trace.layer, "chunk": trace.chunk, "window": trace.window,
        "score": [float(f"{s:.4g}") if math.isfinite(s) else None for s in score],
        "rank": rank.tolist(),
        "held": held(trace, row),
        "mass": [[round(share, 4) for share in shares] for shares in trace.mass[row].tolist()],
        "looked": looked,
    }  # fmt: skip


def held(trace: LayerTrace, row: int = 0) -> list[list[int | None]]:
    """[position, first chunk, chunk at which it was gone or None] for all that was ever stored."""
    gone = dict(trace.evicted(row))
    first: dict[int, int] = {}
    for n in range(trace.position.shape[1]):
        for position in trace.remembered(row, n):
            first.setdefault(position, n)
    return [[position, first[position], gone.get(position)] for position in sorted(first)]


def embeddable_json(data: Any) -> str:
    """JSON that may stand inside a script element: no sign in it can end the element."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _write_whole(path: Path, text: str) -> Path:
    """Write beside the target, then rename: readers see the old file or the new one."""
    handle, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)
    return path
