"""Pictures of a memory: which tokens it held while a text was read, and how surprising each was.

Every function draws into an axes that it is given and returns it.  Scores are shown by rank, not by
value: innovations span orders of magnitude, and the memory's decisions depend on their order alone.

Symbols: l length, n chunks, m_e eidetic tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from bmojo_core.inspect.trace import LayerTrace

STORED = "#D55E00"  # vermilion of the Okabe-Ito palette
MASS = (("window", "#0072B2"), ("fading", "#009E73"), ("eidetic", STORED))


def text_heat(
    ax: Axes,
    tokens: Sequence[str],
    score: np.ndarray,
    stored: Sequence[int],
    columns: int = 80,
) -> Axes:
    """A text as a grid of cells, shaded by the rank of their score; stored tokens are boxed.

    Parameters
    ----------
    tokens
        What to print in each cell (l strings); line breaks are shown as a mark and break the line.
    score
        Score of each token (l,).
    stored
        Positions to box.
    columns
        Cells in a line.
    """
    cells = _layout(tokens, columns)
    rank = np.argsort(np.argsort(score)) / max(1, len(score) - 1)
    rows = 1 + max(row for row, _ in cells)
    shade = np.full((rows, columns), np.nan)
    for (row, column), r in zip(cells, rank, strict=True):
        shade[row, column] = r
    ax.imshow(shade, cmap="Blues", vmin=0, vmax=1.6, aspect="auto", interpolation="nearest")
    for (row, column), token in zip(cells, tokens, strict=True):
        ax.text(column, row, _printed(token), ha="center", va="center", family="monospace",
                fontsize=6.5)  # fmt: skip
    for position in stored:
        row, column = cells[position]
        ax.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=STORED, linewidth=1.6)
        )
    ax.set_axis_off()
    return ax


def timeline(ax: Axes, trace: LayerTrace, row: int = 0) -> Axes:
    """Each stored token as a bar from the chunk that first held it to the one that gave it up."""
    chunks = trace.position.shape[1]
    for n in range(chunks):
        for position in trace.remembered(row, n):
            span = [n * trace.chunk, (n + 1) * trace.chunk]
            ax.plot(span, [position] * 2, color=STORED, lw=1.2, ls="-", marker="")
    length = trace.score.shape[1]
    reading = np.arange(length)
    ax.fill_between(reading, np.maximum(0, reading - trace.window + 1), reading, color="#0072B2",
                    alpha=0.25, lw=0, label="window")  # fmt: skip
    ax.plot([], [], color=STORED, ls="-", marker="", label="eidetic memory")
    ax.set(xlabel="position being read", ylabel="position remembered", xlim=(0, length),
           ylim=(0, length))  # fmt: skip
    ax.legend(loc="upper left", frameon=False)
    return ax


def attention_shares(ax: Axes, trace: LayerTrace, row: int = 0) -> Axes:
    """Share of each query's attention on window, fading and eidetic tokens, stacked."""
    mass = trace.mass[row].cpu().numpy().T
    ax.stackplot(
        np.arange(mass.shape[1]), mass, colors=[c for _, c in MASS], labels=[n for n, _ in MASS]
    )
    ax.set(xlabel="query position", ylabel="share of attention", xlim=(0, mass.shape[1] - 1),
           ylim=(0, 1))  # fmt: skip
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    return ax


def _layout(tokens: Sequence[str], columns: int) -> list[tuple[int, int]]:
    """(row, column) of every token: wrapped at ``columns``, broken after a line break."""
    cells, row, column = [], 0, 0
    for token in tokens:
        if column == columns:
            row, column = row + 1, 0
        cells.append((row, column))
        row, column = (row + 1, 0) if token == "\n" else (row, column + 1)
    return cells


def _printed(token: str) -> str:
    return {"\n": "↵", "\t": "→", " ": ""}.get(token, token)
