"""A circuit as a static picture, in the layout of the page."""

from __future__ import annotations

import os
from collections import Counter

from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.path import Path

from tl_edgeprune.circuit import Circuit
from tl_edgeprune.report.figures import FAINT, INK, MUTED, saved_figure
from tl_edgeprune.report.layout import (
    FONT_SIZE,
    KIND_LABELS,
    KINDS,
    LAYER_LABEL_X,
    NODE_HEIGHT,
    Curve,
    Layout,
    circuit_layout,
)

KIND_COLORS = {
    "q": "#2f6fd0",
    "k": "#e08413",
    "v": "#1c9a6c",
    "attn": "#0e93a8",
    "mlp": "#8a55c7",
    "logits": "#d23a62",
}
_POINTS_PER_INCH = 72.0
_LEGEND_HEIGHT = 34.0
_HUB_SHADE = 0.3  # how much darker the most connected node is ...
_HUB_FROM = 30  # ... in a circuit where it has at least so many edges


def draw_circuit(
    circuit: Circuit,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    dpi: int = 120,
) -> None:
    """Draw the circuit to `path` (.png, .svg or .pdf): input below, logits above.

    Edges are coloured by what they enter (query, key, value, MLP, logits); dead ones are dashed.
    The picture grows with the circuit: a unit of the layout is a point, 1/72 inch.

    Args:
        circuit: any Circuit; one of more than some thousand edges is better read as `write_html`.
        path: the file, replaced as a whole.
        title: a line above the drawing.
        dpi: resolution of a .png.

    Raises:
        ValueError: the path has another ending.
    """
    layout = circuit_layout(circuit)
    alive = set(circuit.without_dead_edges().edges)
    head = 26.0 if title else 0.0
    height = layout.height + _LEGEND_HEIGHT + head
    width = max(layout.width, 330.0)
    with saved_figure(path, width / _POINTS_PER_INCH, height / _POINTS_PER_INCH, dpi) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        spare = (width - layout.width) / 2
        axes.set(xlim=(-spare, layout.width + spare), ylim=(layout.height + _LEGEND_HEIGHT, -head))
        axes.axis("off")
        _draw_layers(axes, layout)
        _draw_edges(axes, layout, alive)
        _draw_nodes(axes, layout)
        _draw_legend(axes, layout)
        if title:
            axes.text(layout.width / 2, 0, title, ha="center", fontsize=13, fontweight="bold")


def edge_opacity(n_edges: int) -> float:
    """The more edges, the fainter each: dense parts then show as darker, not as a solid block."""
    return min(0.9, max(0.16, 12.0 / max(n_edges, 1) ** 0.5))


def _draw_layers(axes: Axes, layout: Layout) -> None:
    for layer, (top, bottom) in layout.layers.items():
        if layer % 2 == 0:
            axes.axhspan(top, bottom, color=FAINT, alpha=0.4, linewidth=0, zorder=0)
        axes.text(LAYER_LABEL_X, (top + bottom) / 2, str(layer), ha="right", va="center",
                  color=MUTED, fontsize=FONT_SIZE)  # fmt: skip
    for kv, heads in layout.groups.items():
        xs = [layout.places[name].x for name in (kv, *heads)]
        y = layout.places[kv].y
        axes.plot([min(xs), max(xs)], [y, y], color=MUTED, linewidth=1.6, alpha=0.6, zorder=1)


def _draw_edges(axes: Axes, layout: Layout, alive: set[str]) -> None:
    opacity = edge_opacity(len(layout.edges))
    for living in (False, True):
        chosen = [i for i, e in enumerate(layout.edges) if (e.name in alive) == living]
        axes.add_collection(
            PathCollection(
                [_path(layout.curves[i]) for i in chosen],
                facecolors="none",
                edgecolors=[KIND_COLORS[layout.edges[i].kind] for i in chosen],
                alpha=opacity if living else 0.5 * opacity,
                linewidths=1.5 if len(layout.edges) < 100 else 0.9,
                linestyles="solid" if living else (0, (3, 3)),
                zorder=2,
            ),
            autolim=False,
        )


def _path(curve: Curve) -> Path:
    return Path(curve, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _draw_nodes(axes: Axes, layout: Layout) -> None:
    degrees = Counter(name for e in layout.edges for name in (e.source, e.destination))
    most = max([_HUB_FROM, *degrees.values()])
    for node in layout.nodes:
        x, y = layout.places[node.name]
        dark = node.kind in ("input", "logits")
        corner = {"mlp": 3.0, "kv": 0.5}.get(node.kind, NODE_HEIGHT / 2)
        box = FancyBboxPatch(
            (x - layout.node_width / 2, y - NODE_HEIGHT / 2),
            layout.node_width,
            NODE_HEIGHT,
            boxstyle=f"round,pad=0,rounding_size={corner}",
            facecolor=INK if dark else _node_color(node.kind, degrees[node.name] / most),
            edgecolor=INK if dark else MUTED,
            linewidth=0.9,
            zorder=3,
        )
        axes.add_patch(box)
        color = "white" if dark else INK
        axes.text(x, y, node.name, ha="center", va="center_baseline", color=color,
                  fontsize=FONT_SIZE - 0.5, zorder=4)  # fmt: skip


def _node_color(kind: str, share: float) -> tuple[float, float, float]:
    """Darker for nodes with more edges; `share` is of the most connected node's."""
    base = to_rgb("#f4eefb" if kind == "mlp" else "white")
    ink = to_rgb(INK)
    shade = _HUB_SHADE * share**0.5
    return tuple((1 - shade) * b + shade * i for b, i in zip(base, ink, strict=True))


def _draw_legend(axes: Axes, layout: Layout) -> None:
    kinds = [kind for kind in KINDS if any(edge.kind == kind for edge in layout.edges)]
    if kinds:
        handles = [Line2D([], [], color=KIND_COLORS[kind], linewidth=2.5) for kind in kinds]
        labels = [KIND_LABELS[kind] for kind in kinds]
        axes.legend(handles, labels, loc="lower center", ncols=len(kinds), fontsize=10.5,
                    handlelength=1.3, columnspacing=1.3, borderaxespad=0.6)  # fmt: skip
