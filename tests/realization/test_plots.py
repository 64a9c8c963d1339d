"""The shared pictures: every line tells itself apart, and the data drawn are the data given."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from random_systems import random_system

from realization import balanced_truncation, plots


@pytest.fixture(autouse=True)
def clean_matplotlib():
    with matplotlib.rc_context():
        plots.use_style()
        yield
    plt.close("all")


def test_lines_differ_in_colour_style_and_marker_at_once():
    ax = plt.subplots()[1]
    lines = [ax.plot([0, 1], [i, i])[0] for i in range(7)]
    for get in ("get_color", "get_marker"):
        assert len({getattr(line, get)() for line in lines}) == 7
    assert len({str(line._dash_pattern) for line in lines}) == 7
    assert plots.line_style(7) == plots.line_style(0) != plots.line_style(1)


def test_what_is_drawn_is_what_was_given():
    sys = random_system(0, 4, 2, 2, radius=0.9)
    reduced, _ = balanced_truncation(sys, 2)
    both = {"all": sys, "two states": reduced}

    ax = plots.poles(both)
    drawn = ax.lines[1]
    assert np.allclose(drawn.get_xdata() + 1j * drawn.get_ydata(), sys.poles)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["all", "two states"]

    ax = plots.impulse(both, 15, output=1, input=0)
    assert np.allclose(ax.lines[1].get_ydata(), reduced.markov(15)[:, 1, 0])

    ax = plots.singular_values([3.0, 1.0, 0.0])
    assert ax.get_yscale() == "log" and np.all(ax.lines[0].get_ydata() > 0)

    gain, phase = plots.frequency_response(both, output=0, input=1, points=50)
    omega = gain.lines[0].get_xdata()
    G = sys.transfer_function(np.exp(1j * omega))[:, 0, 1]
    assert np.allclose(10 ** (gain.lines[0].get_ydata() / 20), np.abs(G))
    turn = np.radians(phase.lines[0].get_ydata()) - np.angle(G)
    assert np.allclose(np.exp(1j * turn), 1)


def test_given_axes_are_used_and_nothing_is_shown():
    sys = random_system(1, 2, 1, 1)
    figure, axes = plt.subplots(1, 2)
    assert plots.poles(sys, axes[0]) is axes[0]
    assert plots.impulse(sys, ax=axes[1]) is axes[1]
    assert plt.get_fignums() == [figure.number]
    with pytest.raises(ValueError, match="k must be"):
        plots.impulse(sys, 0)
