"""A circuit as a static picture, with the layout of the page."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.path import Path

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.graph.names import KIND_LABELS, KINDS
from tl_edgeprune.report.circuit.labels import pair_names
from tl_edgeprune.report.circuit.layout import (
    FONT_SIZE,
    LAYER_LABEL_X,
    NODE_HEIGHT,
    SPAN_ROOM,
    Curve,
    Layout,
    circuit_layout,
)
from tl_edgeprune.report.figures import saved_figure
from tl_edgeprune.report.palette import FAINT, INK, KIND_COLORS, KIND_MARKERS, MUTED, SIDE_COLORS

_POINTS_PER_INCH = 72.0
_LEGEND_HEIGHT = 34.0
_DOTTED, _DASHED = (0, (1.2, 2)), (0, (5, 2.2))
_HUB_SHADE = 0.3  # how much darker the most connected node is ...
_HUB_FROM = 30  # ... if it has at least this many edges


def draw_circuit(
    circuit: Circuit,
    path: str | os.PathLike[str],
    *,
    other: Circuit | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
    dpi: int = 120,
) -> None:
    """Draw the circuit to `path` (.png, .svg or .pdf): input below, logits above.

    Edges are coloured by what they enter (query, key, value, MLP, logits), and end in a marker that
    shows the same; dead edges are dotted. For two circuits, colour shows which edges are in both or
    only in one. The picture grows with the circuit: a unit of the layout is a point, 1/72 inch.

    Args:
        circuit: any Circuit; with more than a few thousand edges, `write_html` is easier to read.
        path: the file, replaced as a whole.
        other: a second circuit of the same graph, overlaid on the first.
        names: of the two circuits; by default their methods.
        title: a line above the drawing.
        dpi: resolution of a .png.

    Raises:
        ValueError: the path has another ending, or `other` another graph.
    """
    union = circuit if other is None else circuit | other
    layout = circuit_layout(union)
    strokes = (
        _by_kind(circuit, layout)
        if other is None
        else _by_side(circuit, other, names or pair_names((circuit, other)))
    )
    title_height = 26.0 if title else 0.0
    height = layout.height + _LEGEND_HEIGHT + title_height
    width = max(layout.width, 330.0, _legend_width(strokes))
    with saved_figure(path, width / _POINTS_PER_INCH, height / _POINTS_PER_INCH, dpi) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        side_margin = (width - layout.width) / 2
        axes.set(xlim=(-side_margin, layout.width + side_margin))
        axes.set(ylim=(layout.height + _LEGEND_HEIGHT, -title_height))
        axes.axis("off")
        _draw_layers(axes, layout)
        _draw_edges(axes, layout, strokes)
        _draw_nodes(axes, layout)
        _draw_ports(axes, layout, neutral=other is not None)
        _draw_legend(axes, strokes)
        if title:
            axes.text(layout.width / 2, 0, title, ha="center", fontsize=13, fontweight="bold")


def edge_opacity(n_edges: int) -> float:
    """The more edges, the fainter each, so that dense parts are darker but not solid."""
    return min(0.9, max(0.16, 12.0 / max(n_edges, 1) ** 0.5))


@dataclass(frozen=True)
class _Stroke:
    """How a group of edges is drawn, and its label in the legend."""

    edges: frozenset[str]
    color: str
    dashes: Any = "solid"
    faint: float = 1.0
    label: str | None = None
    marker: str = ""


def _by_kind(circuit: Circuit, layout: Layout) -> list[_Stroke]:
    alive = frozenset(circuit.without_dead_edges().edges)
    strokes = []
    for kind in KINDS:
        edges = frozenset(edge.name for edge in layout.edges if edge.kind == kind)
        color = KIND_COLORS[kind]
        strokes += [_Stroke(edges - alive, color, _DOTTED, 0.5)] if edges - alive else []
        label, marker = KIND_LABELS[kind], KIND_MARKERS[kind]
        strokes += [_Stroke(edges & alive, color, label=label, marker=marker)] if edges else []
    return strokes


def _by_side(circuit: Circuit, other: Circuit, names: Sequence[str]) -> list[_Stroke]:
    first, second = names
    sides = [
        (circuit & other, "shared", "solid", "in both"),
        (circuit - other, "a", "solid", f"only in {first}"),
        (other - circuit, "b", _DASHED, f"only in {second}"),
    ]
    return [
        _Stroke(frozenset(c.edges), SIDE_COLORS[side], dashes, label=f"{label} ({len(c):,})")
        for c, side, dashes, label in sides
    ]


def _draw_layers(axes: Axes, layout: Layout) -> None:
    for layer, (top, bottom) in layout.layers.items():
        if layer % 2 == 0:
            axes.axhspan(top, bottom, color=FAINT, alpha=0.4, linewidth=0, zorder=0)
        axes.text(LAYER_LABEL_X, (top + bottom) / 2, str(layer), ha="right", va="center",
                  color=MUTED, fontsize=FONT_SIZE)  # fmt: skip
    for span, (x0, x1) in layout.spans.items():
        axes.plot([x0, x0], [8, layout.height - 8], color=FAINT, linewidth=1, zorder=0.5)
        axes.text((x0 + x1) / 2, layout.height - SPAN_ROOM, span, ha="center", va="center",
                  color=MUTED, fontsize=FONT_SIZE + 1, parse_math=False)  # fmt: skip
    for group in layout.links:
        xs = [layout.places[name].x for name in group]
        y = layout.places[group[0]].y
        axes.plot([min(xs), max(xs)], [y, y], color=MUTED, linewidth=1.2, alpha=0.7, zorder=1,
                  linestyle=(0, (1.2, 2)))  # fmt: skip


def _draw_edges(axes: Axes, layout: Layout, strokes: Sequence[_Stroke]) -> None:
    opacity = edge_opacity(len(layout.edges))
    for stroke in strokes:
        curves = zip(layout.edges, layout.curves, strict=True)
        axes.add_collection(
            PathCollection(
                [_path(curve) for edge, curve in curves if edge.name in stroke.edges],
                facecolors="none",
                edgecolors=stroke.color,
                alpha=stroke.faint * opacity,
                linewidths=1.5 if len(layout.edges) < 100 else 0.9,
                linestyles=stroke.dashes,
                zorder=2,
            ),
            autolim=False,
        )


def _path(curve: Curve) -> Path:
    return Path(curve, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _draw_ports(axes: Axes, layout: Layout, neutral: bool) -> None:
    """A marker where edges enter a node, by what they enter."""
    for kind in KINDS:
        ends = {curve[3] for e, curve in zip(layout.edges, layout.curves, strict=True)
                if e.kind == kind}  # fmt: skip
        color = MUTED if neutral else KIND_COLORS[kind]
        for end in sorted(ends):
            axes.plot([end.x], [end.y + 1], marker=KIND_MARKERS[kind], color=color, markersize=4.5,
                      markeredgecolor="white", markeredgewidth=0, zorder=5)  # fmt: skip


def _draw_nodes(axes: Axes, layout: Layout) -> None:
    degrees = Counter(name for e in layout.edges for name in (e.source, e.destination))
    max_degree = max([_HUB_FROM, *degrees.values()])
    for node in layout.nodes:
        x, y = layout.places[node.name]
        dark = node.kind in ("input", "logits")
        corner = {"mlp": 3.0, "kv": 0.5}.get(node.kind, NODE_HEIGHT / 2)
        box = FancyBboxPatch(
            (x - layout.node_width / 2, y - NODE_HEIGHT / 2),
            layout.node_width,
            NODE_HEIGHT,
            boxstyle=f"round,pad=0,rounding_size={corner}",
            facecolor=INK if dark else _node_color(node.kind, degrees[node.name] / max_degree),
            edgecolor=INK if dark else MUTED,
            linewidth=0.9,
            zorder=3,
        )
        axes.add_patch(box)
        color = "white" if dark else INK
        axes.text(x, y, node.label, ha="center", va="center_baseline", color=color,
                  fontsize=FONT_SIZE - 0.5, zorder=4)  # fmt: skip


def _node_color(kind: str, share: float) -> tuple[float, float, float]:
    """Darker for nodes with more edges; `share` is of the most connected node's."""
    base = to_rgb("#fbf2f8" if kind == "mlp" else "white")
    ink = to_rgb(INK)
    shade = _HUB_SHADE * share**0.5
    return tuple((1 - shade) * b + shade * i for b, i in zip(base, ink, strict=True))


def _legend_width(strokes: Sequence[_Stroke]) -> float:
    """An upper estimate of the legend's width in points."""
    return math.fsum(46 + 6.2 * len(label) for label in {s.label for s in strokes if s.label})


def _draw_legend(axes: Axes, strokes: Sequence[_Stroke]) -> None:
    labelled = {stroke.label: stroke for stroke in strokes if stroke.label}
    handles = [
        Line2D([], [], color=s.color, linewidth=2.2, linestyle=s.dashes, marker=s.marker,
               markersize=5.5)
        for s in labelled.values()
    ]  # fmt: skip
    if handles:
        axes.legend(handles, list(labelled), loc="lower center", ncols=len(labelled), fontsize=10.5,
                    handlelength=1.8, columnspacing=1.3, borderaxespad=0.6)  # fmt: skip
