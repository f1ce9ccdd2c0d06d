"""Methods side by side: how far from the model, and at what size and cost."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from tl_edgeprune.report.figures import FAINT, INK, MUTED, saved_figure

# Okabe and Ito's colours, which stay apart for the colour-blind; with markers, apart in grey too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
DASHES = ("-", (0, (5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "<", ">", "*")
NAMES = {"kl": "KL to the full model (nats)", "mse": "Mean squared error"}
_DOTTED: dict[str, Any] = {"linewidth": 1.1, "linestyle": ":"}
DECADES = 6  # what is this many powers of ten below a panel's largest value counts as 0


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
    and the distance against the seconds of the run. A line joins a method's sizes. Distances are
    on a logarithmic axis; those a million times below the largest are drawn at its bottom, "0".

    Args:
        table: a DataFrame such as `Comparison.table`.
        measure: the column that is the distance, "kl" or "mse".
        title: a line above the panels.
        dpi: dots an inch, of a .png.

    Raises:
        ValueError: no rows, missing columns, or another measure.
    """
    _check(table, measure)
    spots = [("n_edges", measure), ("n_edges", "faithfulness")]
    spots += [("seconds", measure), ("n_edges", "exact_match")]
    with saved_figure(path, 9.6, 7.4, dpi) as figure:
        panels = figure.subplots(2, 2).flatten()
        for axes, (x, y) in zip(panels, spots, strict=True):
            _plot(axes, table, x, y)
        handles, names = panels[0].get_legend_handles_labels()
        columns = min(len(names), 6 if len(names) <= 6 else 5)
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=10)
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
        figure.set_layout_engine("constrained", h_pad=0.09, w_pad=0.09)


def _check(table: Any, measure: str) -> None:
    if measure not in NAMES:
        raise ValueError(f"measure={measure!r}: expected one of {', '.join(NAMES)}.")
    wanted = ("method", "n_edges", "faithfulness", "exact_match", "seconds", measure)
    missing = [name for name in wanted if name not in table]
    if missing:
        raise ValueError(f"the table has no column {', '.join(missing)}: pass Comparison.table.")
    if not len(table):
        raise ValueError("the table has no rows: there is nothing to draw.")


def _plot(axes: Axes, table: Any, x: str, y: str) -> None:
    titles = NAMES | {"faithfulness": "Faithfulness", "exact_match": "Exact match"}
    axes.set_ylabel(titles[y], color=INK)
    axes.set_xlabel("Edges kept" if x == "n_edges" else "Seconds of the run (larger: more edges)")
    if table[y].isna().all():
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not for this task", color=MUTED, ha="center", transform=axes.transAxes)
        return
    distance = y in NAMES
    floor = _floor(table[y]) if distance else -math.inf
    for place, (method, rows) in enumerate(table.groupby("method", sort=False)):
        rows = rows.sort_values("n_edges")
        values = [max(value, floor) for value in rows[y].tolist()]
        again, place = divmod(place, len(COLORS))  # colours used again come with other marks
        color, marker = COLORS[place], MARKERS[(place + 3 * again) % len(MARKERS)]
        style: dict[str, Any] = {"color": color, "zorder": 3, "linestyle": DASHES[again % 2]}
        style |= {"linewidth": 1.8} if x == "n_edges" else _DOTTED
        axes.plot(rows[x].tolist(), values, **style)
        edges = rows["n_edges"].tolist()
        sizes = 46.0 if x == "n_edges" else [_area(count, table["n_edges"]) for count in edges]
        marks: dict[str, Any] = {
            "marker": marker,
            "color": color,
            "edgecolor": "white",
            "linewidth": 0.7,
        }
        axes.scatter(rows[x].tolist(), values, s=sizes, label=str(method), zorder=4, **marks)
    _log(axes, "x", table[x].astype(float).tolist())
    if distance:
        _log(axes, "y", [max(value, floor) for value in table[y].tolist()], floor)
    elif y == "exact_match":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(-0.04, 1.04)
    if y == "faithfulness":
        axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def _area(edges: int, all_edges: Any) -> float:
    """A mark's area in square points, from 24 for the smallest circuit to 120 for the largest."""
    low, high = (math.log(max(1, count)) for count in (all_edges.min(), all_edges.max()))
    return 24 + 96 * (math.log(max(1, edges)) - low) / max(high - low, 1e-9)


def _floor(values: Any) -> float:
    """Where what counts as 0 is drawn on a logarithmic axis."""
    finite = [value for value in values.tolist() if math.isfinite(value)]
    top = max(finite, default=0.0)
    if top <= 0:
        return 1.0
    positive = [value for value in finite if value > top * 10**-DECADES]
    return min(positive) / 3 if len(positive) < len(finite) else -math.inf


def _log(axes: Axes, which: str, values: Sequence[float], floor: float = -math.inf) -> None:
    """A logarithmic axis with plain numbers, and 0 at its floor."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    ticks = _ticks([value for value in values if value > floor], 6 if which == "x" else 7)
    labels = {tick: f"{tick:,.10g}" if tick >= 1e-3 else f"{tick:.0e}" for tick in ticks}
    if floor > 0:
        ticks, labels = [floor, *ticks], {floor: "0"} | labels
    axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: labels.get(value, "")))
    axis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.tick_params(which="major", length=3, color=MUTED)
    axes.grid(True, which="minor", color=FAINT, alpha=0.4)


def _ticks(values: Sequence[float], most: int) -> list[float]:
    """Round numbers over the values' range, at most about so many: 1, 2, 5 or powers of ten."""
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
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]
