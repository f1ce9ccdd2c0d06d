"""Logarithmic axes with plain round numbers as ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from tl_edgeprune.report.palette import FAINT, MUTED


def log_axis(axes: Axes, which: str, values: Sequence[float], floor: float = -math.inf) -> None:
    """A logarithmic axis with plain numbers, and 0 at its floor."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    ticks = round_ticks([value for value in values if value > floor], 6 if which == "x" else 7)
    labels = {tick: f"{tick:,.10g}" if tick >= 1e-3 else f"{tick:.0e}" for tick in ticks}
    if floor > 0:
        ticks, labels = [floor, *ticks], {floor: "0"} | labels
    axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: labels.get(value, "")))
    axis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.tick_params(which="major", length=3, color=MUTED)
    axes.grid(True, which="minor", color=FAINT, alpha=0.4)


def round_ticks(values: Sequence[float], most: int) -> list[float]:
    """Round numbers (1, 2, 5 or powers of ten) over the values' range, about `most` at most.

    If the range has fewer than two of them, its ends.
    """
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if not positive:
        return []
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [
            step * 10.0**power
            for power in range(low, high + 1)
            for step in steps
            if min(positive) / 1.3 <= step * 10.0**power <= max(positive) * 1.3
        ]
        if len(ticks) < 2:
            return sorted({float(f"{end:.3g}") for end in (min(positive), max(positive))})
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]
