"""Distinct line styles for one plot (colour, marker, dashes), and the legend."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tl_edgeprune.report.palette import SERIES

MARKERS = ("o", "s", "^", "D", "v", "<", ">", "*", "P", "X", "p")
DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (7, 2, 1.2, 2)))


def series_style(place: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line at this index; the first 88 are distinct.

    Colours repeat after eight lines, with other dashes; markers after eleven.
    """
    return {
        "color": SERIES[place % len(SERIES)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[(place // len(SERIES)) % len(DASHES)],
        "linewidth": 1.8,
        "markersize": 6.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
        "zorder": 3,
    }


def legend_below(figure: Figure, axes: Axes, *, columns: int, fontsize: float = 10) -> None:
    """A legend below the plots; the figure grows by its rows."""
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.24 * (rows - 1))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=fontsize,
                  handlelength=3.2)  # fmt: skip
