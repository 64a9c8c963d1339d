"""The pictures that the chapters share.

Every line differs from its neighbours in colour, line style and marker at once, so that a figure
can be read in grey and by eyes that tell few colours apart (palette: Okabe and Ito, 2008).
Functions draw on the axes that they are given, or make their own, and return them; none calls
`show`. matplotlib is imported when a function is called, not with the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from realization.systems import StateSpace, positive_integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OKABE_ITO = (
    "#0072B2",  # blue
    "#D55E00",  # vermilion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#E69F00",  # orange
    "#56B4E9",  # sky blue
    "#000000",  # black
)
LINESTYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def use_style() -> None:
    """Set matplotlib's defaults for the chapters: palette, line styles, markers, quiet axes.

    Returns
    -------
    None
        It changes `matplotlib.rcParams` of this process.
    """
    import matplotlib as mpl
    from cycler import cycler

    cycle = cycler(color=OKABE_ITO) + cycler(linestyle=LINESTYLES) + cycler(marker=MARKERS)
    mpl.rcParams.update(
        {
            "axes.prop_cycle": cycle,
            "axes.grid": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.labelsize": 9,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "grid.alpha": 0.25,
            "lines.linewidth": 1.4,
            "lines.markersize": 4,
            "figure.figsize": (6.4, 2.8),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "savefig.dpi": 110,
        }
    )


def line_style(i: int) -> dict[str, object]:
    """Colour, line style and marker of the i-th line, as keyword arguments for `Axes.plot`.

    Parameters
    ----------
    i : int
        0, 1, ..; the cycle has seven entries.

    Returns
    -------
    dict
    """
    i %= len(OKABE_ITO)
    return {"color": OKABE_ITO[i], "linestyle": LINESTYLES[i], "marker": MARKERS[i]}


def _named(systems: StateSpace | dict[str, StateSpace]) -> dict[str, StateSpace]:
    return systems if isinstance(systems, dict) else {"": systems}


def _axes(ax: Axes | None) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots()[1] if ax is None else ax


def poles(systems: StateSpace | dict[str, StateSpace], ax: Axes | None = None) -> Axes:
    """Poles in the complex plane, with the unit circle.

    Parameters
    ----------
    systems : StateSpace or dict of str to StateSpace
        One system, or several with their names for the legend.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes
    """
    ax = _axes(ax)
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 361))
    ax.plot(circle.real, circle.imag, color="0.6", linestyle="-", marker="", linewidth=0.8)
    for i, (name, sys) in enumerate(_named(systems).items()):
        style = line_style(i) | {"linestyle": "none", "markersize": 7 - i, "fillstyle": "none"}
        ax.plot(sys.poles.real, sys.poles.imag, label=name, **style)
    ax.set(xlabel="real part", ylabel="imaginary part", title="poles", aspect="equal")
    if isinstance(systems, dict):
        ax.legend()
    return ax


def impulse(
    systems: StateSpace | dict[str, StateSpace],
    k: int = 40,
    *,
    output: int = 0,
    input: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Markov parameters M_0 .. M_{k-1} of one channel: the response to an impulse.

    Parameters
    ----------
    systems : StateSpace or dict of str to StateSpace
        One system, or several with their names for the legend.
    k : int
        Number of steps.
    output, input : int
        The channel.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes
    """
    k = positive_integer("k", k)
    ax = _axes(ax)
    for i, (name, sys) in enumerate(_named(systems).items()):
        ax.plot(sys.markov(k)[:, output, input], label=name, markevery=2, **line_style(i))
    ax.set(xlabel="step", ylabel="output", title="response to an impulse")
    if isinstance(systems, dict):
        ax.legend()
    return ax


def singular_values(
    values: ArrayLike | dict[str, ArrayLike], ax: Axes | None = None, *, title: str | None = None
) -> Axes:
    """Singular values on a logarithmic axis, numbered from 1.

    Parameters
    ----------
    values : array_like, shape (k,), or dict of str to array_like
        Descending; zeros are drawn at the bottom as the smallest positive double would be.
    ax : matplotlib Axes, optional
    title : str, optional

    Returns
    -------
    matplotlib Axes
    """
    ax = _axes(ax)
    named = values if isinstance(values, dict) else {"": values}
    for i, (name, s) in enumerate(named.items()):
        s = np.maximum(np.asarray(s, dtype=float), np.finfo(float).tiny)
        ax.semilogy(np.arange(1, s.size + 1), s, label=name, **line_style(i))
    ax.set(xlabel="number", ylabel="singular value", title=title or "singular values")
    ax.xaxis.get_major_locator().set_params(integer=True)
    if isinstance(values, dict):
        ax.legend()
    return ax


def frequency_response(
    systems: StateSpace | dict[str, StateSpace],
    *,
    output: int = 0,
    input: int = 0,
    axes: Sequence[Axes] | None = None,
    points: int = 400,
) -> Sequence[Axes]:
    """Gain and phase of one channel over the frequency, side by side.

    Parameters
    ----------
    systems : StateSpace or dict of str to StateSpace
        One system, or several with their names for the legend.
    output, input : int
        The channel.
    axes : pair of matplotlib Axes, optional
        Gain in decibels, phase in degrees; frequencies in radians a step.
    points : int
        Frequencies between 0 and pi.

    Returns
    -------
    pair of matplotlib Axes
    """
    import matplotlib.pyplot as plt

    points = positive_integer("points", points)
    gain, phase = plt.subplots(1, 2)[1] if axes is None else axes
    omega = np.pi * (np.arange(points) + 0.5) / points
    for i, (name, sys) in enumerate(_named(systems).items()):
        G = sys.transfer_function(np.exp(1j * omega))[:, output, input]
        style = line_style(i) | {"markevery": max(1, points // 12)}
        level = 20 * np.log10(np.maximum(np.abs(G), np.finfo(float).tiny))
        gain.plot(omega, level, label=name, **style)
        phase.plot(omega, np.degrees(np.unwrap(np.angle(G))), label=name, **style)
    gain.set(xlabel="frequency (rad / step)", ylabel="gain (dB)", title="gain")
    phase.set(xlabel="frequency (rad / step)", ylabel="phase (degrees)", title="phase")
    if isinstance(systems, dict):
        gain.legend()
    return gain, phase
