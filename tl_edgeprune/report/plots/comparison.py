"""Methods side by side: their distance from the model, by size and cost."""

from __future__ import annotations

import math
import os
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from tl_edgeprune.evaluation.measures import MEASURES, Measure
from tl_edgeprune.report.figures import saved_figure
from tl_edgeprune.report.palette import INK, MUTED
from tl_edgeprune.report.plots.axes import log_axis
from tl_edgeprune.report.plots.series import legend_below, series_style

_WIDTH = 9.6  # inches
DECADES = 6  # a value this many powers of ten below a panel's largest counts as 0


def plot_comparison(
    table: Any,
    path: str | os.PathLike[str],
    *,
    measure: str = "kl",
    title: str | None = None,
    dpi: int = 200,
) -> None:
    """Draw a comparison's table in four panels, and write it to `path` (.png, .svg or .pdf).

    The distance from the model, the faithfulness and the exact match against the circuits' edges,
    and the distance against the seconds of the run. A line joins a method's sizes; if the method
    chose the size, its threshold and number of edges are beside the point. Distances are on a
    logarithmic axis; those a million times below the largest are drawn at the bottom, as "0".

    Args:
        table: a DataFrame, such as `Comparison.table`.
        measure: the column that is the distance, "kl" or "mse".
        title: a line above the panels.
        dpi: dots per inch, for a .png.

    Raises:
        ValueError: no rows, missing columns, or another measure.
    """
    _check(table, measure)
    spots = [("n_edges", measure), ("n_edges", "faithfulness")]
    spots += [("seconds", measure), ("n_edges", "exact_match")]
    with saved_figure(path, _WIDTH, 7.4, dpi) as figure:
        panels = figure.subplots(2, 2).flatten()
        for axes, (x, y) in zip(panels, spots, strict=True):
            _plot(axes, table, x, y)
        legend_below(figure, panels[0], columns=_columns(table))
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
        figure.set_layout_engine("constrained", h_pad=0.09, w_pad=0.09)


def _check(table: Any, measure: str) -> None:
    distances = [m.name for m in MEASURES.values() if m.is_distance and m.column is not None]
    if measure not in distances:
        raise ValueError(f"measure={measure!r}: expected one of {', '.join(distances)}.")
    wanted = ("method", "n_edges", "faithfulness", "exact_match", "seconds", measure)
    missing = [name for name in wanted if name not in table]
    if missing:
        raise ValueError(f"the table has no column {', '.join(missing)}: pass Comparison.table.")
    if not len(table):
        raise ValueError("the table has no rows: there is nothing to draw.")


def _plot(axes: Axes, table: Any, x: str, y: str) -> None:
    axes.set_ylabel(_axis_title(MEASURES[y]), color=INK)
    axes.set_xlabel("Edges kept" if x == "n_edges" else "Seconds of the run (larger: more edges)")
    if table[y].isna().all():
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not for this task", color=MUTED, ha="center", transform=axes.transAxes)
        return
    distance = MEASURES[y].is_distance
    floor = _floor(table[y]) if distance else -math.inf
    for index, (method, rows) in enumerate(table.groupby("method", sort=False)):
        rows = rows.sort_values("n_edges")
        values = [max(value, floor) for value in rows[y].tolist()]
        style = series_style(index)
        _name_thresholds(axes, rows, x, values, style["color"])
        if x == "n_edges":
            axes.plot(rows[x].tolist(), values, label=str(method), **style)
            continue
        line = {name: style[name] for name in ("color", "zorder")}
        axes.plot(rows[x].tolist(), values, **line, linewidth=1.1, linestyle=":")
        marks = {name: style[name] for name in ("color", "marker", "zorder")}
        areas = [_area(count, table["n_edges"]) for count in rows["n_edges"].tolist()]
        axes.scatter(rows[x].tolist(), values, s=areas, edgecolor="white", linewidth=0.7, **marks)
    log_axis(axes, "x", table[x].astype(float).tolist())
    if distance:
        log_axis(axes, "y", [max(value, floor) for value in table[y].tolist()], floor)
    elif y == "exact_match":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(-0.04, 1.04)
    if y == "faithfulness":
        axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def _axis_title(measure: Measure) -> str:
    unit = f" ({measure.unit})" if measure.unit else ""
    return f"{measure.label[0].upper()}{measure.label[1:]}{unit}"


def _name_thresholds(axes: Axes, rows: Any, x: str, values: list[float], color: str) -> None:
    """Write the threshold and number of edges beside each point that has a threshold."""
    if "threshold" not in rows:
        return
    spots = zip(rows[x].tolist(), values, rows["threshold"], rows["n_edges"], strict=True)
    for at, value, threshold, n_edges in spots:
        if not math.isnan(threshold) and math.isfinite(value):
            axes.annotate(
                f"{threshold:g}: {n_edges:,} edges",
                (at, value),
                xytext=(5, 4),
                textcoords="offset points",
                color=color,
                fontsize=7,
            )


def _columns(table: Any) -> int:
    """Columns of the legend: as many as fit with the longest name."""
    longest = max(len(str(method)) for method in table["method"])
    return max(1, min(6, int(_WIDTH / (0.62 + 0.085 * longest))))


def _area(edges: int, all_edges: Any) -> float:
    """A mark's area in square points, from 24 for the smallest circuit to 120 for the largest."""
    low, high = (math.log(max(1, count)) for count in (all_edges.min(), all_edges.max()))
    return 24 + 96 * (math.log(max(1, edges)) - low) / max(high - low, 1e-9)


def _floor(values: Any) -> float:
    """The value at which 0 is drawn on a logarithmic axis."""
    finite = [value for value in values.tolist() if math.isfinite(value)]
    top = max(finite, default=0.0)
    if top <= 0:
        return 1.0
    positive = [value for value in finite if value > top * 10**-DECADES]
    return min(positive) / 3 if len(positive) < len(finite) else -math.inf
