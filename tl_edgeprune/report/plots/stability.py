"""How often repeated runs find an edge, and how much each two of them agree."""

from __future__ import annotations

import os
from collections import Counter

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tl_edgeprune.evaluation.stability import Stability
from tl_edgeprune.report.figures import saved_figure
from tl_edgeprune.report.palette import BLUE, INK

_NUMBERED = 10  # with at most this many runs, the map has numbers


def plot_stability(
    found: Stability,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    dpi: int = 200,
) -> None:
    """Draw a Stability in two panels, and write it to `path` (.png, .svg or .pdf).

    Left: the number of edges in the circuits of exactly 1, 2, … of the runs. Right: the Jaccard
    index (edges in both over edges in either) of each two runs.

    Args:
        found: what to draw.
        path: the file, replaced as a whole.
        title: a line above the panels.
        dpi: dots per inch, for a .png.

    Raises:
        ValueError: the path has another ending.
    """
    n = len(found.circuits)
    side = min(5.2, max(3.2, 0.42 * n + 1.2))
    with saved_figure(path, 3.8 + side + 0.5, side, dpi) as figure:
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
        left_axes, right_axes = figure.subplots(1, 2, width_ratios=[3.8, side])
        _draw_counts(left_axes, found)
        _draw_agreement(figure, right_axes, found)
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")


def _draw_counts(axes: Axes, found: Stability) -> None:
    n = len(found.circuits)
    runs = (found.frequencies * n).round().int()
    counts = Counter(runs[runs > 0].tolist())
    bars = axes.bar(range(1, n + 1), [counts[k] for k in range(1, n + 1)], color=BLUE, width=0.8)
    if n <= _NUMBERED:
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=9, color=INK, padding=2)
    axes.grid(False, axis="x")
    axes.set_xlabel(f"Runs that find the edge, of {n}")
    axes.set_ylabel("Edges")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_agreement(figure: Figure, axes: Axes, found: Stability) -> None:
    overlaps = [[a.iou(b) for b in found.circuits] for a in found.circuits]
    picture = axes.imshow(overlaps, cmap="Blues", vmin=0, vmax=1)
    n = len(overlaps)
    if n <= _NUMBERED:
        for i, row in enumerate(overlaps):
            for j, value in enumerate(row):
                color = "white" if value > 0.55 else INK
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    names = [_run_name(*run) for run in found.runs]
    labels = names if n <= 20 else [""] * n
    axes.set_xticks(range(n), labels, rotation=90 if max(map(len, labels)) > 3 else 0, fontsize=9)
    axes.set_yticks(range(n), labels, fontsize=9)
    axes.grid(False)
    axes.set_title(f"Jaccard index, mean {found.jaccard:.2f}", fontsize=10.5, loc="left")
    figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.03).outline.set_visible(False)


def _run_name(seed: int | None, resample: int | None) -> str:
    seeds = [] if seed is None else [f"seed {seed}"]
    return ", ".join([*seeds, *([] if resample is None else [f"resample {resample}"])])
