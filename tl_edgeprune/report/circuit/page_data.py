"""What a circuit's page shows, as data: the JSON object that the page's script reads.

`page_of` builds it from a circuit, its scores, measures and settings. All its text is plain text,
never markup: the script sets it with textContent. Numbers are finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.circuits.circuit import Circuit, check_scores
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.graph.names import KIND_LABELS, KINDS
from tl_edgeprune.report.circuit.labels import (
    Lines,
    measure_lines,
    pair_names,
    plain,
    setting_lines,
    title_of,
)
from tl_edgeprune.report.circuit.layout import (
    FONT_SIZE,
    LAYER_LABEL_X,
    NODE_HEIGHT,
    PORTS,
    SPAN_ROOM,
    Layout,
    circuit_layout,
)
from tl_edgeprune.report.plots.history_curves import curves_of, thin_out

CURVE_POINTS = 300  # training steps on a page, at most


@dataclass(frozen=True)
class PageNode:
    """A node: its kind (input, head, kv, mlp, logits), layer (-1 for the ends) and centre."""

    name: str
    label: str  # the name without its span
    kind: str
    layer: int
    span: str | None
    at: tuple[float, float]


@dataclass(frozen=True)
class PageEdge:
    """An edge: the indices of its nodes, and its Bezier curve as alternating x and y.

    circuits: the page's circuits that contain it. dead: those in which it is dead. rank: 0 for the
    strongest, by score. facts: from an explanation.
    """

    name: str
    source: int
    destination: int
    kind: str  # q, k, v, attn, mlp or logits
    curve: tuple[float, ...]
    dead: tuple[int, ...]
    score: float | None
    rank: int
    circuits: tuple[int, ...]
    facts: dict[str, float | int | str]


@dataclass(frozen=True)
class PageCircuit:
    """One of the circuits on the page, and its measures."""

    name: str
    n_edges: int
    n_dead: int
    measures: Lines


@dataclass(frozen=True)
class PageDrawing:
    """The layout's sizes in points; layers and spans are (name, from, to); links join nodes."""

    size: tuple[float, float]
    node_size: tuple[float, float]
    font_size: float
    ports: dict[str, float]  # where an edge enters, in node widths from the centre
    layer_label_x: float
    span_room: float
    layers: list[tuple[int, float, float]]
    spans: list[tuple[str, float, float]]
    links: list[list[int]]


@dataclass(frozen=True)
class Page:
    """The whole page.

    mode: "one" circuit; an "overlay" of two; or "sizes", circuits in order of size, of which the
    slider shows one at a time, initially that of index `first`. scored: whether edges have scores;
    then the slider for one circuit shows only its strongest edges. curves: of the training, at most
    CURVE_POINTS steps.
    """

    title: str
    graph_edges: int
    mode: str
    scored: bool
    kinds: dict[str, str]  # kinds in the drawing, with their labels
    drawing: PageDrawing
    nodes: list[PageNode]
    edges: list[PageEdge]
    circuits: list[PageCircuit]
    first: int
    curves: dict[str, Any] | None
    settings: Lines


def page_of(
    circuit: Circuit,
    *,
    title: str | None = None,
    scores: EdgeScores | Float[Tensor, " edge"] | None = None,
    other: Circuit | None = None,
    circuits: Sequence[Circuit] = (),
    names: Sequence[str] | None = None,
    result: Any = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    measures: Any = None,
    settings: Mapping[str, Any] | None = None,
    explanation: Any = None,
) -> Page:
    """The data of a circuit's page; the arguments are those of `write_html`."""
    if other is not None and circuits:
        raise ValueError(
            "other= overlays two circuits, circuits= lets the slider choose among several: give "
            "one of the two."
        )
    mode = "overlay" if other is not None else "sizes" if circuits else "one"
    drawn = [circuit, *([other] if other is not None else []), *circuits]
    figures = _figures(measures, drawn)
    labels = _names(names, drawn, mode)
    order = list(range(len(drawn)))
    if mode == "sizes":
        order.sort(key=lambda index: drawn[index].n_edges)
        drawn, figures, labels = (
            _in_order(order, drawn),
            _in_order(order, figures),
            _in_order(order, labels),
        )
    union = reduce(or_, drawn)
    if result is not None:
        scores = result.scores if scores is None else scores
        history = result.history if history is None else history
    weights = None if scores is None else _weights(union, scores)
    alive = [each.without_dead_edges() for each in drawn]
    layout = circuit_layout(union)
    return Page(
        title=title if title is not None else title_of(circuit, sized=mode == "one"),
        graph_edges=circuit.graph.n_edges,
        mode=mode,
        scored=weights is not None,
        kinds={k: KIND_LABELS[k] for k in KINDS if any(e.kind == k for e in layout.edges)},
        drawing=_drawing(layout),
        nodes=[
            PageNode(n.name, n.label, n.kind, n.layer, n.span, _rounded(layout.places[n.name]))
            for n in layout.nodes
        ],
        edges=_edges(layout, drawn, alive, weights, _facts(explanation)),
        circuits=[
            PageCircuit(label, each.n_edges, each.n_edges - live.n_edges, lines)
            for label, each, live, lines in zip(labels, drawn, alive, figures, strict=True)
        ],
        first=order.index(0),
        curves=thin_out(curves_of(history), CURVE_POINTS) if history else None,
        settings=setting_lines(_settings(circuit) if settings is None else settings),
    )


def _in_order(order: Sequence[int], items: Sequence[Any]) -> list[Any]:
    return [items[index] for index in order]


def _names(names: Sequence[str] | None, circuits: Sequence[Circuit], mode: str) -> list[str]:
    """The circuits' names: as given, otherwise their methods or sizes."""
    if names is not None:
        if len(names) != len(circuits):
            raise ValueError(f"{len(names)} names for {len(circuits)} circuits: give one of each.")
        return list(names)
    if mode == "overlay":
        return list(pair_names(circuits))
    return [f"{circuit.n_edges:,} edges" for circuit in circuits]


def _figures(measures: Any, circuits: Sequence[Circuit]) -> list[Lines]:
    """Each circuit's measures; by default those in its metadata ("held_out")."""
    if isinstance(measures, Sequence):
        if len(measures) != len(circuits):
            raise ValueError(
                f"{len(measures)} measures for {len(circuits)} circuits: give one of each, the "
                "circuit's own first."
            )
        given_measures = list(measures)
    else:
        given_measures = [measures, *[None] * (len(circuits) - 1)]
    held_out = [each.metadata.get("held_out") for each in circuits]
    defaults = [figures if isinstance(figures, Mapping) else {} for figures in held_out]
    pairs = zip(given_measures, defaults, strict=True)
    return [measure_lines(default if g is None else g) for g, default in pairs]


def _settings(circuit: Circuit) -> dict[str, Any]:
    """A circuit's metadata without its measures, its settings last."""
    origin = {k: v for k, v in circuit.metadata.items() if k not in ("held_out", "settings")}
    settings = circuit.metadata.get("settings")
    return origin | (dict(settings) if isinstance(settings, Mapping) else {})


def _weights(
    circuit: Circuit, scores: EdgeScores | Float[Tensor, " edge"]
) -> list[tuple[float, float]]:
    """(score, value that it is ranked by) of each edge of the circuit, in order."""
    if isinstance(scores, EdgeScores):
        if scores.graph != circuit.graph:
            raise ValueError(
                f"the scores are of another graph than the circuit: {scores.graph}, the circuit's "
                f"is {circuit.graph}. Give the scores of the run that found it."
            )
        values, ranked = scores.tensor.detach().cpu(), scores.ranking()
    else:
        check_scores(scores, circuit.graph)
        values = ranked = scores.detach().cpu()
    mask = circuit.mask
    return list(zip(values[mask].tolist(), ranked[mask].tolist(), strict=True))


def _facts(explanation: Any) -> dict[str, dict[str, float | int | str]]:
    """The explanation's facts about edges, by edge name."""
    if explanation is None:
        return {}
    return {
        edge: {str(name): plain(value) for name, value in facts.items()}
        for edge, facts in explanation.by_edge().items()
    }


def _drawing(layout: Layout) -> PageDrawing:
    node_index = {node.name: i for i, node in enumerate(layout.nodes)}
    return PageDrawing(
        size=_rounded((layout.width, layout.height)),
        node_size=(round(layout.node_width, 1), NODE_HEIGHT),
        font_size=FONT_SIZE,
        ports=PORTS,
        layer_label_x=LAYER_LABEL_X,
        span_room=SPAN_ROOM if layout.spans else 0.0,
        layers=[(n, *_rounded(band)) for n, band in layout.layers.items()],
        spans=[(name, *_rounded(band)) for name, band in layout.spans.items()],
        links=[[node_index[name] for name in group] for group in layout.links],
    )


def _edges(
    layout: Layout,
    circuits: Sequence[Circuit],
    alive: Sequence[Circuit],
    weights: list[tuple[float, float]] | None,
    facts: Mapping[str, dict[str, float | int | str]],
) -> list[PageEdge]:
    node_index = {node.name: i for i, node in enumerate(layout.nodes)}
    has = [set(circuit.edges) for circuit in circuits]
    living = [set(circuit.edges) for circuit in alive]
    order = list(range(len(layout.edges)))
    if weights is not None:
        order.sort(key=lambda i: -weights[i][1])
    rank = {i: position for position, i in enumerate(order)}
    holders = [tuple(n for n, edges in enumerate(has) if e.name in edges) for e in layout.edges]
    return [
        PageEdge(
            name=edge.name,
            source=node_index[edge.source],
            destination=node_index[edge.destination],
            kind=edge.kind,
            curve=tuple(round(c, 1) for point in layout.curves[i] for c in point),
            dead=tuple(n for n in holders[i] if edge.name not in living[n]),
            score=None if weights is None else float(f"{weights[i][0]:.6g}"),
            rank=rank[i],
            circuits=holders[i],
            facts=facts.get(edge.name, {}),
        )
        for i, edge in enumerate(layout.edges)
    ]


def _rounded(pair: Sequence[float]) -> tuple[float, float]:
    first, second = pair
    return round(first, 1), round(second, 1)
