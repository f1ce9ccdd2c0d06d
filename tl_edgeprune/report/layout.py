"""Where every node and edge of a circuit is drawn: one layout for the page and for the figure.

1. Only what the circuit touches has a place: its nodes, their layers (rows, upwards from the
   input to the logits) and their heads (columns, the same head above itself in every layer).
2. A layer's MLP stands half a row above its heads, in a column of its own on the right. With
   grouped-query attention a group's `kv` node stands right after the group's heads.
3. An edge leaves the top of its source and enters the bottom of its destination, q, k and v at
   their own ports. It is one cubic Bezier curve; where it would run through the nodes of its own
   column it is bowed, so the MLPs' edges form an arc diagram beside the heads.

Units are points, y downwards (as in SVG).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tl_edgeprune.circuit import Circuit

KINDS = ("q", "k", "v", "attn", "mlp", "logits")
KIND_LABELS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "attn": "head",
    "mlp": "MLP",
    "logits": "logits",
}

NODE_HEIGHT = 17.0
FONT_SIZE = 10.5
MARGIN = 30.0
_TOP = MARGIN + NODE_HEIGHT / 2
LABEL_GUTTER = 40.0  # left of the nodes, for the layer numbers
LAYER_LABEL_X = 34.0  # their right end
PORTS = {"q": -0.28, "k": 0.0, "v": 0.28}  # where an edge enters, in node widths off the middle

_NODE = re.compile(
    r"a(?P<head_layer>\d+)\.(?P<part>h|kv)(?P<index>\d+)"
    r"|m(?P<mlp_layer>\d+)"
    r"|(?P<end>input|tok|pos|logits)"
)
_PORT = re.compile(r"<([qkv])>$")


class Node(NamedTuple):
    """A parsed node name; kind is input, head, kv, mlp or logits."""

    name: str
    kind: str
    layer: int  # -1 for inputs and the logits
    number: int  # head, group, or the place among the inputs


class Edge(NamedTuple):
    """A parsed edge name: the names of its two nodes and its kind, one of KINDS."""

    name: str
    source: str
    destination: str
    kind: str


class Point(NamedTuple):
    x: float
    y: float


Curve = tuple[Point, Point, Point, Point]  # a cubic Bezier: start, two controls, end


@dataclass(frozen=True)
class Layout:
    """Places of a circuit's nodes (centres) and edges, in one box of `width` by `height`."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    places: dict[str, Point]
    curves: tuple[Curve, ...]
    layers: dict[int, tuple[float, float]]  # top and bottom of each layer drawn, with its MLP
    groups: dict[str, tuple[str, ...]]  # kv node -> the heads drawn that read from it
    node_width: float
    width: float
    height: float


def parse_node(name: str) -> Node:
    """Parse a source's or a destination's node name, without its `<q>`, `<k>` or `<v>`."""
    match = _NODE.fullmatch(name)
    if match is None:
        raise ValueError(
            f"node name {name!r}: expected input, tok, pos, logits, a<layer>.h<head>, "
            "a<layer>.kv<group> or m<layer>, as EdgeGraph names them."
        )
    if match["end"]:
        kind = "logits" if name == "logits" else "input"
        return Node(name, kind, -1, int(name == "pos"))
    if match["mlp_layer"]:
        return Node(name, "mlp", int(match["mlp_layer"]), 0)
    kind = "head" if match["part"] == "h" else "kv"
    return Node(name, kind, int(match["head_layer"]), int(match["index"]))


def parse_edge(name: str) -> Edge:
    """Parse an edge name such as `a0.h3->a5.h2<q>`; edges of all spans lie on one another."""
    source, arrow, target = name.partition("@")[0].partition("->")
    if not arrow:
        raise ValueError(f"edge name {name!r}: expected 'source->destination', as in 'm0->logits'.")
    port = _PORT.search(target)
    destination = _PORT.sub("", target)
    node_kind = parse_node(destination).kind
    kind = port[1] if port else {"head": "attn", "kv": "attn"}.get(node_kind, node_kind)
    return Edge(name, source, destination, kind)


def lay_out(edge_names: Sequence[str], heads_per_group: int = 1) -> Layout:
    """Place the nodes and curves of these edges; a kv node stands after its group."""
    edges = tuple(map(parse_edge, edge_names))
    names = {name for edge in edges for name in (edge.source, edge.destination)}
    parsed = map(parse_node, names or {"input", "logits"})
    nodes = tuple(sorted(parsed, key=lambda node: _order(node, heads_per_group)))
    node_width = 16 + 0.59 * FONT_SIZE * max(len(node.name) for node in nodes)
    pitch = _row_pitch(nodes)
    layers = _layer_rows(nodes, pitch)
    across = _across(nodes, heads_per_group, node_width)
    places = {node.name: Point(across[node.name], _down(node, layers, pitch)) for node in nodes}
    columns = _columns(places)
    curves = tuple(_curve(edge, places, columns, node_width, pitch) for edge in edges)
    return Layout(
        nodes=nodes,
        edges=edges,
        places=places,
        curves=curves,
        layers={layer: (y - 0.75 * pitch, y + 0.25 * pitch) for layer, y in layers.items()},
        groups=_groups(nodes, heads_per_group),
        node_width=node_width,
        width=_right_end(places, curves, node_width) + MARGIN,
        height=max(place.y for place in places.values()) + NODE_HEIGHT / 2 + MARGIN,
    )


def circuit_layout(circuit: Circuit) -> Layout:
    """The layout of a circuit's edges."""
    return lay_out(tuple(circuit.edges), circuit.graph.n_heads // circuit.graph.n_kv_heads)


def _order(node: Node, heads_per_group: int) -> tuple[float, bool, float]:
    """From the inputs to the logits: the heads of a layer before its MLP, a kv after its heads."""
    layer = math.inf if node.kind == "logits" else float(node.layer)
    return layer, node.kind == "mlp", _slot(node, heads_per_group)


def _slot(node: Node, heads_per_group: int) -> float:
    """A head's place in its row; a kv node's is between its group's last head and the next."""
    return (node.number + 1) * heads_per_group - 0.5 if node.kind == "kv" else float(node.number)


def _row_pitch(nodes: Sequence[Node]) -> float:
    """Rows are far apart in small circuits and close in deep ones: a screen holds either."""
    n_layers = len({node.layer for node in nodes if node.layer >= 0})
    return min(84.0, max(39.0, 1000.0 / (n_layers + 1)))


def _layer_rows(nodes: Sequence[Node], pitch: float) -> dict[int, float]:
    """The y of each layer's heads; layers without a node take no room."""
    layers = sorted({node.layer for node in nodes if node.layer >= 0}, reverse=True)
    return {layer: _TOP + (place + 1.25) * pitch for place, layer in enumerate(layers)}


def _down(node: Node, layers: dict[int, float], pitch: float) -> float:
    """The y of a node, given that of each layer's heads."""
    if node.kind == "logits":
        return _TOP
    if node.kind == "input":
        return _TOP + (len(layers) + 1) * pitch
    return layers[node.layer] - (0.5 * pitch if node.kind == "mlp" else 0.0)


def _across(nodes: Sequence[Node], heads_per_group: int, node_width: float) -> dict[str, float]:
    """The x of each node: heads in columns, MLPs right of them, input and logits in the middle."""
    slot = {n.name: _slot(n, heads_per_group) for n in nodes if n.kind in ("head", "kv")}
    used = sorted(set(slot.values())) or [0.0]
    pitch = node_width + (34 if len(used) < 6 else 14)
    left = LABEL_GUTTER + MARGIN + node_width / 2
    columns = {place: left + i * pitch for i, place in enumerate(used)}
    right = left + (len(used) - 1) * pitch
    ends = {"tok": -0.7 * node_width, "pos": 0.7 * node_width}

    def place(node: Node) -> float:
        if node.kind == "mlp":
            return right + 1.7 * node_width
        return columns[slot[node.name]] if node.name in slot else middle + ends.get(node.name, 0.0)

    middle = (left + right) / 2
    return {node.name: place(node) for node in nodes}


def _columns(places: dict[str, Point]) -> dict[float, list[float]]:
    """The y of every node, by its x."""
    columns: dict[float, list[float]] = {}
    for place in places.values():
        columns.setdefault(place.x, []).append(place.y)
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
    """How far a curve's controls stand aside, so that it does not hide behind its own column."""
    start, end = places[edge.source], places[edge.destination]
    if start.x != end.x or not any(end.y < y < start.y for y in columns[start.x]):
        return 0.0
    rise = start.y - end.y
    if edge.kind == "mlp":
        return 0.55 * node_width + 0.2 * rise
    side = 1.0 if edge.kind == "v" else -1.0
    return side * (0.62 * node_width + 0.02 * rise)


def _groups(nodes: Sequence[Node], heads_per_group: int) -> dict[str, tuple[str, ...]]:
    return {
        kv.name: tuple(
            head.name
            for head in nodes
            if head.kind == "head"
            and head.layer == kv.layer
            and head.number // heads_per_group == kv.number
        )
        for kv in nodes
        if kv.kind == "kv"
    }


def _right_end(places: dict[str, Point], curves: Sequence[Curve], node_width: float) -> float:
    """The right end of the drawing; a cubic reaches at most 3/4 of the way to its controls."""
    nodes = max(place.x for place in places.values()) + node_width / 2
    bows = (0.25 * min(c[0].x, c[3].x) + 0.75 * max(c[1].x, c[2].x) for c in curves)
    return max(nodes, *bows, nodes)
