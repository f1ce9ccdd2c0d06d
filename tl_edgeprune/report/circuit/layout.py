"""Where every node and edge of a circuit is drawn: one layout for the page and the figure.

1. Only the circuit's nodes are drawn: layers are rows, upwards from the input to the logits, and
   heads are columns, each head in the same column in every layer.
2. A layer's MLP is half a row above its heads, in a separate column on the right. With
   grouped-query attention, a group's `kv` node follows the group's heads.
3. In a graph with spans, every span has a separate drawing, side by side, and the heads of a layer
   are packed without gaps.
4. An edge leaves the top of its source and enters the bottom of its destination, q, k and v at
   separate ports. It is one cubic Bezier curve. If it would run through the nodes of its column, it
   is bowed, so the MLPs' edges form an arc diagram beside the heads. In circuits small enough to be
   read edge by edge, a curve that would pass behind other nodes is bent around them.

Units are points, y downwards (as in SVG).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.graph.names import Edge, Node, parse_edge, parse_node

NODE_HEIGHT = 17.0
FONT_SIZE = 10.5
MARGIN = 30.0
_TOP = MARGIN + NODE_HEIGHT / 2
LABEL_GUTTER = 40.0  # left of the nodes, for layer numbers
LAYER_LABEL_X = 34.0  # their right end
_ASPECT = 1.3  # width over height
SPAN_ROOM = 26.0  # below the nodes, for the spans' names
BENT_UP_TO = 400  # edges; in larger circuits nobody follows a single one by eye
_BENDS = (0.0, -0.8, 0.8, -1.6, 1.6, -2.6, 2.6)  # of a curve's controls, in node widths
_CLEARANCE = 2.0  # of a curve from a node
PORTS = {"q": -0.28, "k": 0.0, "v": 0.28}  # where an edge enters, in node widths from the centre


class Point(NamedTuple):
    x: float
    y: float


Curve = tuple[Point, Point, Point, Point]  # a cubic Bezier: start, two controls, end
Band = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """Positions of a circuit's nodes (centres) and edges, in a box of `width` by `height`."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    places: dict[str, Point]
    curves: tuple[Curve, ...]
    layers: dict[int, Band]  # top and bottom of each layer drawn, with its MLP
    spans: dict[str, Band]  # left and right of each span; empty without spans
    links: tuple[tuple[str, ...], ...]  # nodes of one row that one attention joins
    node_width: float
    width: float
    height: float


def circuit_layout(circuit: Circuit) -> Layout:
    """The layout of a circuit's edges."""
    graph = circuit.graph
    spans = tuple(getattr(graph, "spans", ()))
    return lay_out(tuple(circuit.edges), graph.n_heads // graph.n_kv_heads, spans)


def lay_out(
    edge_names: Sequence[str], heads_per_group: int = 1, spans: Sequence[str] = ()
) -> Layout:
    """The layout of these edges.

    Args:
        edge_names: the edges.
        heads_per_group: heads that share keys and values; a kv node follows its group's heads.
        spans: from left to right; spans that are not listed follow in order of appearance.
    """
    edges = tuple(map(parse_edge, edge_names))
    names = {name: None for edge in edges for name in (edge.source, edge.destination)}
    parsed = [parse_node(name) for name in names or {"input": None, "logits": None}]
    spans_used = dict.fromkeys(node.span for node in parsed if node.span is not None)
    spans = [span for span in dict.fromkeys((*spans, *spans_used)) if span in spans_used]
    nodes = tuple(sorted(parsed, key=lambda node: _order(node, heads_per_group, spans)))
    node_width = 16 + 0.59 * FONT_SIZE * max(len(node.label) for node in nodes)
    pitch = _row_pitch(nodes)
    layers = _layer_rows(nodes, pitch)
    if spans:
        across, bands = _across_spans(nodes, heads_per_group, node_width, spans)
    else:
        height = pitch * (len(layers) + 1)
        across, bands = _across(nodes, heads_per_group, node_width, height), {}
    places = {node.name: Point(across[node.name], _down(node, layers, pitch)) for node in nodes}
    columns = _columns(places)
    curves = tuple(_curve(edge, places, columns, node_width, pitch) for edge in edges)
    if len(edges) <= BENT_UP_TO:
        curves = tuple(map(_Obstacles(places, node_width).around, edges, curves))
    right = max([_right_end(places, curves, node_width), *(right for _, right in bands.values())])
    bottom = max(place.y for place in places.values()) + NODE_HEIGHT / 2 + MARGIN
    return Layout(
        nodes=nodes,
        edges=edges,
        places=places,
        curves=curves,
        layers={layer: (y - 0.75 * pitch, y + 0.25 * pitch) for layer, y in layers.items()},
        spans=bands,
        links=_links(nodes, heads_per_group),
        node_width=node_width,
        width=right + MARGIN,
        height=bottom + (SPAN_ROOM if bands else 0.0),
    )


def _order(
    node: Node, heads_per_group: int, spans: Sequence[str]
) -> tuple[float, bool, float, int]:
    """Sorts nodes from the inputs to the logits: a layer's heads, each kv after its heads, MLP."""
    layer = math.inf if node.kind == "logits" else float(node.layer)
    span = -1 if node.span is None else spans.index(node.span)
    return layer, node.kind == "mlp", _slot(node, heads_per_group), span


def _slot(node: Node, heads_per_group: int) -> float:
    """A head's slot in its row; a kv node's is between its group's last head and the next."""
    return (node.number + 1) * heads_per_group - 0.5 if node.kind == "kv" else float(node.number)


def _row_pitch(nodes: Sequence[Node]) -> float:
    """The distance of rows: large in small circuits, small in deep ones, to fit a screen."""
    n_layers = len({node.layer for node in nodes if node.layer >= 0})
    return min(84.0, max(30.0, 960.0 / (n_layers + 1)))


def _layer_rows(nodes: Sequence[Node], pitch: float) -> dict[int, float]:
    """The y of each layer's heads; layers without a node take no space."""
    layers = sorted({node.layer for node in nodes if node.layer >= 0}, reverse=True)
    return {layer: _TOP + (row + 1.25) * pitch for row, layer in enumerate(layers)}


def _down(node: Node, layers: dict[int, float], pitch: float) -> float:
    """The y of a node, given that of each layer's heads."""
    if node.kind == "logits":
        return _TOP
    if node.kind == "input":
        return _TOP + (len(layers) + 1) * pitch
    return layers[node.layer] - (0.5 * pitch if node.kind == "mlp" else 0.0)


def _across(
    nodes: Sequence[Node], heads_per_group: int, node_width: float, height: float
) -> dict[str, float]:
    """The x of each node: heads in columns, MLPs right of them, input and logits in the middle.

    The distance of columns gives the drawing about the proportions of a screen.
    """
    slot = {n.name: _slot(n, heads_per_group) for n in nodes if n.kind in ("head", "kv")}
    used = sorted(set(slot.values())) or [0.0]
    free = _ASPECT * height / (len(used) + 2) - node_width
    pitch = node_width + min(34.0, max(14.0, free))
    first_x = LABEL_GUTTER + MARGIN + node_width / 2
    columns = {place: first_x + i * pitch for i, place in enumerate(used)}
    last_x = first_x + (len(used) - 1) * pitch
    middle = (first_x + last_x) / 2

    def place(node: Node) -> float:
        if node.kind == "mlp":
            return last_x + 1.7 * node_width
        return columns[slot[node.name]] if node.name in slot else middle + _end(node, node_width)

    return {node.name: place(node) for node in nodes}


def _end(node: Node, node_width: float) -> float:
    """Offset of an input or the logits from the centre: two inputs are side by side."""
    return {"tok": -0.7, "pos": 0.7}.get(node.label, 0.0) * node_width


def _across_spans(
    nodes: Sequence[Node], heads_per_group: int, node_width: float, spans: Sequence[str]
) -> tuple[dict[str, float], dict[str, Band]]:
    """The x of each node, and the left and right of each span.

    In a span, a row's heads are packed from the left; its MLPs are right of the longest row.
    """
    pitch, left_x = node_width + 14, LABEL_GUTTER + MARGIN
    across: dict[str, float] = {}
    bands: dict[str, Band] = {}
    for span in spans:
        in_span = [node for node in nodes if node.span == span]
        rows: dict[int, list[Node]] = {}
        for node in in_span:
            if node.kind in ("head", "kv"):
                rows.setdefault(node.layer, []).append(node)
        columns = max([1, *map(len, rows.values())])
        has_mlp = any(node.kind == "mlp" for node in in_span)
        ends = 2 if any(node.label == "pos" for node in in_span) else 1
        wide = max(columns + has_mlp, ends) * pitch + (0.45 * node_width if has_mlp else 0.0)
        wide = max(wide, 0.62 * FONT_SIZE * len(span)) + 14
        first = left_x + 14 + node_width / 2
        for row in rows.values():
            row.sort(key=lambda node: _slot(node, heads_per_group))
            across |= {node.name: first + place * pitch for place, node in enumerate(row)}
        for node in in_span:
            if node.kind == "mlp":
                across[node.name] = first + columns * pitch
            elif node.kind in ("input", "logits"):
                across[node.name] = first + (columns - 1) * pitch / 2 + _end(node, node_width)
        bands[span] = (left_x, left_x + wide)
        left_x += wide
    return across, bands


def _columns(places: dict[str, Point]) -> dict[float, list[float]]:
    """The y of every node, by its x."""
    columns: dict[float, list[float]] = {}
    for point in places.values():
        columns.setdefault(point.x, []).append(point.y)
    return columns


def _curve(
    edge: Edge,
    places: dict[str, Point],
    columns: dict[float, list[float]],
    node_width: float,
    pitch: float,
) -> Curve:
    start, end = places[edge.source], places[edge.destination]
    start = Point(start.x, start.y - NODE_HEIGHT / 2)
    end = Point(end.x + PORTS.get(edge.kind, 0.0) * node_width, end.y + NODE_HEIGHT / 2)
    rise = start.y - end.y
    bow = _bow(edge, places, columns, node_width)
    reach = rise / 3 if bow else min(max(0.5 * rise, 0.3 * pitch), 1.5 * pitch)
    return (
        start,
        Point(start.x + bow, start.y - reach),
        Point(end.x + bow, end.y + reach),
        end,
    )


def _bow(
    edge: Edge,
    places: dict[str, Point],
    columns: dict[float, list[float]],
    node_width: float,
) -> float:
    """Sideways offset of a curve's controls, so that it does not hide behind its column."""
    start, end = places[edge.source], places[edge.destination]
    if start.x != end.x or not any(end.y < y < start.y for y in columns[start.x]):
        return 0.0
    rise = start.y - end.y
    if edge.kind == "mlp":
        room = 0.2 if parse_node(edge.source).span is None else 0.05  # spans are side by side
        return 0.55 * node_width + room * rise
    side = 1.0 if edge.kind == "v" else -1.0
    return side * (0.62 * node_width + 0.02 * rise)


class _Obstacles:
    """The nodes, as boxes that only their edges should touch."""

    def __init__(self, places: dict[str, Point], node_width: float) -> None:
        self._names = list(places)
        self._centres = np.array(list(places.values()))  # [node, 2]
        half = np.array([node_width, NODE_HEIGHT]) / 2
        self._half = half + _CLEARANCE
        self._bends = np.array(list(itertools.product(_BENDS, _BENDS))) * node_width
        # Least bent first; of these, the smoothest (both controls on one side) first.
        effort = np.abs(self._bends).sum(1) + 0.5 * np.abs(self._bends[:, 0] - self._bends[:, 1])
        self._bends = self._bends[np.argsort(effort, kind="stable")]

    def around(self, edge: Edge, curve: Curve) -> Curve:
        """The curve with the least bend that passes behind the fewest nodes."""
        if not self._hidden_by(edge, np.array([curve]))[0]:
            return curve
        bent = np.repeat(np.array([curve]), len(self._bends), axis=0)  # [bend, point, 2]
        bent[:, 1:3, 0] += self._bends
        least = bent[self._hidden_by(edge, bent).argmin()]  # the first of several equal ones
        start, *controls, end = (Point(float(x), float(y)) for x, y in least)
        return start, controls[0], controls[1], end

    def _hidden_by(self, edge: Edge, curves: np.ndarray) -> np.ndarray:
        """How many nodes, other than its two, each of these curves of an edge passes behind."""
        foreign = [name not in (edge.source, edge.destination) for name in self._names]
        along = _points(curves)  # [curve, point, 2]
        off = np.abs(along[:, :, None] - self._centres[foreign])  # [curve, point, node, 2]
        in_gutter = (along[..., 0] < LABEL_GUTTER).any(1)  # worse than behind any node
        return (off < self._half).all(-1).any(1).sum(1) + in_gutter * len(self._names)


def _points(curves: np.ndarray) -> np.ndarray:
    """Points along cubic Bezier curves [curve, 4, 2]."""
    t = np.linspace(0, 1, 48)[:, None]
    shares = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    return np.asarray(shares @ curves)


def _links(nodes: Sequence[Node], heads_per_group: int) -> tuple[tuple[str, ...], ...]:
    """Nodes that one attention joins: a kv node and the heads that share it; with spans, a head in
    each span, since its keys and values are read from every later position.
    """
    groups: dict[tuple[int, int], list[Node]] = {}
    for node in nodes:
        if node.kind in ("head", "kv"):
            number = node.number if node.kind == "kv" else node.number // heads_per_group
            groups.setdefault((node.layer, number), []).append(node)
    joined = [
        tuple(sorted(group, key=lambda node: node.kind != "kv"))  # the kv first
        for group in groups.values()
        if len(group) > 1
        and (any(node.kind == "kv" for node in group) or len({node.span for node in group}) > 1)
    ]
    return tuple(tuple(node.name for node in group) for group in joined)


def _right_end(places: dict[str, Point], curves: Sequence[Curve], node_width: float) -> float:
    """The right end of the drawing; a cubic reaches at most 3/4 of the way to its controls."""
    nodes = max(place.x for place in places.values()) + node_width / 2
    bows = (0.25 * min(c[0].x, c[3].x) + 0.75 * max(c[1].x, c[2].x) for c in curves)
    return max(nodes, *bows, nodes)
