"""Draws the results of settings.py: each setting's KL and its training curve.

    python benchmarks/settings_figure.py runs/settings-ioi-t1 docs/figures/settings-ioi-t1.png

Top: the held-out KL at 1,000 edges of every run of 150 steps for 1,000 edges or for any size, one
dot per seed, sorted by mean. The band spans the default's best to worst seed.
Bottom: the objective (running means) during training, for seed 0 of some of them.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import settings
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tl_edgeprune.report.figures import saved_figure
from tl_edgeprune.report.palette import BLUE, FAINT, INK, MUTED, SERIES
from tl_edgeprune.report.plots.history_curves import smooth

STEPS, N_EDGES = 150, 1000
Runs = dict[str, dict[int, float]]
"""The KL of each variant's seeds."""


def runs_in(folder: Path) -> Runs:
    """The runs of STEPS steps for N_EDGES edges, by variant, the best first."""
    found: Runs = {}
    with (folder / "runs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (int(row["steps"]), int(row["n_edges"])) == (STEPS, N_EDGES):
                found.setdefault(label(row), {})[int(row["seed"])] = float(row["kl"])
    return dict(sorted(found.items(), key=lambda item: mean(list(item[1].values()))))


def label(row: dict[str, str]) -> str:
    """The variant, with its learning rate if that was the default at the time."""
    name, rate = row["variant"], float(row["lr"])
    return name if rate == settings.rate(name) else f"{name}, lr {rate:g}"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw_dots(axes: Axes, runs: Runs) -> None:
    default = list(runs["default"].values())
    axes.axvspan(min(default), max(default), color=FAINT, zorder=0)
    for place, (name, seeds) in enumerate(runs.items()):
        values = list(seeds.values())
        color = INK if name == "default" else BLUE
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.6, markersize=6)
        axes.plot(mean(values), place, "|", color=color, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.set_xlabel(f"KL at {N_EDGES:,} edges, nats (a dot a seed, their mean a bar)")


def draw_curves(axes: Axes, folder: Path, names: list[str]) -> None:
    for color, name in zip(SERIES, names, strict=False):
        steps = json.loads((folder / "history" / f"{name}-0-{STEPS}.json").read_text())["steps"]
        losses = smooth([loss for loss, _ in steps], 10)
        axes.plot(losses, color=color, linewidth=2.2 if name == "default" else 1.4, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("Step")
    axes.set_ylabel("Objective (running mean), nats")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", color=MUTED)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of settings.py")
    parser.add_argument("figure", type=Path, help="output file")
    curves = ["default", "lr-0.1", "lr-0.5", "betas-0.8-0.95", "fixed", "init-none", "any-size"]
    parser.add_argument(
        "--curves", nargs="+", default=curves, help="variants whose training curves are drawn"
    )
    options = parser.parse_args()
    runs = runs_in(options.folder)
    with saved_figure(options.figure, 8, 4.5 + 0.27 * len(runs)) as figure:
        heights = [0.27 * len(runs) + 0.6, 3.6]
        above, below = figure.subplots(2, 1, height_ratios=heights)
        draw_dots(above, runs)
        draw_curves(below, options.folder, options.curves)
        figure.set_layout_engine("constrained", h_pad=0.1)


if __name__ == "__main__":
    main()
