"""Faithfulness against the size of the circuit, one line per method."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tl_edgeprune.evaluation.faithfulness import FaithfulnessCurve
from tl_edgeprune.report.figures import saved_figure
from tl_edgeprune.report.palette import MUTED
from tl_edgeprune.report.plots.axes import log_axis
from tl_edgeprune.report.plots.series import legend_below, series_style


def plot_faithfulness(
    curves: Mapping[str, FaithfulnessCurve],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    dpi: int = 200,
) -> None:
    """Draw faithfulness against the edges kept, one line per curve, and write it to `path`.

    Edges are on a logarithmic axis; empty circuits are left out. The dashed line is the full model,
    1. The legend gives the areas under each curve's f and |1 - f|. Only for the curves of
    `mib_faithfulness` are these MIB's measures: CPR is the first area of the signed curve, CMD the
    second area of the absolute one.

    Args:
        curves: by method name.
        path: the file (.png, .svg or .pdf), replaced as a whole.
        title: a line above the plot.
        dpi: dots per inch, for a .png.

    Raises:
        ValueError: no curve, or another ending.
    """
    if not curves:
        raise ValueError(
            "no curves: expected at least one, such as {'eap': faithfulness_curve(…)}."
        )
    with saved_figure(path, 6.4, 4.4, dpi) as figure:
        axes = figure.subplots()
        sizes: list[float] = []
        for index, (name, curve) in enumerate(curves.items()):
            points = [(n, f) for n, f in zip(curve.n_edges, curve.faithfulness, strict=True) if n]
            sizes += [float(n) for n, _ in points]
            label = f"{name} (∫f {curve.cpr:.2f}, ∫|1 − f| {curve.cmd:.2f})"
            xs, ys = [n for n, _ in points], [f for _, f in points]
            axes.plot(xs, ys, label=label, **series_style(index))
        axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        log_axis(axes, "x", sizes)
        axes.set_xlabel("Edges kept, dead ones left out")
        axes.set_ylabel("Faithfulness f (full model 1, no edges 0)")
        legend_below(figure, axes, columns=2)
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
