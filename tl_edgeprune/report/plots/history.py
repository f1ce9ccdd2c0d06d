"""The training curve: the objective and the number of edges kept, over the steps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tl_edgeprune.report.figures import saved_figure
from tl_edgeprune.report.palette import BLUE, GREEN, INK, MUTED
from tl_edgeprune.report.plots.history_curves import Curves, curves_of

LOSS_COLOR, EDGES_COLOR = BLUE, GREEN
_DOTS = {"linestyle": "none", "marker": ".", "markeredgewidth": 0}
_LOG_FROM = 12.0  # an axis is logarithmic if its largest value is this many times its smallest


def plot_history(
    history: Sequence[Mapping[str, float | int | None]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> None:
    """Plot the `history` of an EdgePruner's result, and write it to `path` (.png, .svg or .pdf).

    Above: the objective at each step (faint) and its running mean. Below: the expected number of
    edges kept, and the step's budget (dashed). An axis is logarithmic if its values are positive
    and span more than an order of magnitude.

    Args:
        history: one mapping per logged step, with "step", "loss", "edges" and (or None) "target".
        path: the file, replaced as a whole.
        title: a line above the panels.

    Raises:
        ValueError: the history is empty, or a step lacks one of the values.
    """
    curves = curves_of(history)
    with saved_figure(path, 7.2, 5.4) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.15, 1])
        _plot_loss(top, curves)
        _plot_edges(bottom, curves)
        figure.align_ylabels()
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)


def _plot_loss(axes: Axes, curves: Curves) -> None:
    axes.plot(
        curves.steps, curves.loss, color=LOSS_COLOR, alpha=0.28, linewidth=0.9, label="each step"
    )
    axes.plot(curves.steps, curves.smooth, color=LOSS_COLOR, linewidth=2, label="running mean")
    _scale(axes, curves.loss)
    axes.set_ylabel("Objective")
    _legend(axes)


def _plot_edges(axes: Axes, curves: Curves) -> None:
    steps, edges, target, jumps = curves.steps, curves.edges, curves.target, curves.jumps
    edge_style: dict[str, Any] = _DOTS | {"markersize": 7} if jumps else {"linewidth": 2}
    budget_style: dict[str, Any] = (
        _DOTS | {"markersize": 2} if jumps else {"linewidth": 1.3, "linestyle": (0, (4, 3))}
    )
    axes.plot(steps, edges, color=EDGES_COLOR, label="kept (expected)", **edge_style)
    if any(map(math.isfinite, target)):
        axes.plot(steps, target, color=INK, label="budget", **budget_style)
    _scale(axes, edges + target)
    axes.set_ylabel("Edges")
    axes.set_xlabel("Step")
    axes.margins(x=0.02)
    _legend(axes)
    if not jumps:
        axes.annotate(
            f"{edges[-1]:,.0f}",
            (steps[-1], edges[-1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="right",
            color=EDGES_COLOR,
            fontweight="bold",
        )


def _legend(axes: Axes) -> None:
    """A legend above the panel, where it covers no line."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, fontsize=10, ncols=2)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis if it helps, with plain numbers as ticks."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) >= _LOG_FROM:
        axes.set_yscale("log")
        narrow = max(finite) / min(finite) < 1000
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.grid(True, which="minor", alpha=0.5)
    else:
        axes.set_ylim(bottom=min(0.0, min(finite, default=0.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.tick_params(which="both", length=3, color=MUTED)
