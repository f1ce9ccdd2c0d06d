"""A circuit as one page of HTML that opens from disk: nothing to install, nothing from a network.

The layout is computed here (`layout.py`) and goes into the page as JSON; the page's own script and
style are in `circuit.html`, which loads nothing: its content security policy forbids it.
"""

from __future__ import annotations

import html
import json
import os
import re
from importlib import resources
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.circuit import Circuit
from tl_edgeprune.files import write_whole
from tl_edgeprune.report.layout import (
    FONT_SIZE,
    KIND_LABELS,
    KINDS,
    LAYER_LABEL_X,
    NODE_HEIGHT,
    Layout,
    circuit_layout,
)


def write_html(
    circuit: Circuit,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    summary: dict[str, str] | None = None,
    weights: Float[Tensor, " edge"] | None = None,
) -> None:
    """Write the circuit as an interactive page: hover, pin, search, filter, zoom, save as SVG.

    Args:
        circuit: any Circuit. Up to some 3,000 edges stay fluent.
        path: the .html file, replaced as a whole.
        title: the page's heading; by default it counts the edges.
        summary: lines for the side panel, such as {"model": "gpt2", "KL": "0.12"}.
        weights: a score for every edge of the *graph*, in its flat order (log α, or the scores of
            a method). The page then draws strong edges wider and can show the strongest k alone;
            the strongest is the highest score, so pass `scores.abs()` where the sign is not meant.

    Raises:
        ValueError: `weights` has another length than the graph has edges, or a kept edge's weight
            is not finite.
    """
    scores = None if weights is None else _edge_weights(circuit, weights)
    layout = circuit_layout(circuit)
    heading = title if title is not None else f"Circuit of {circuit.n_edges:,} edges"
    data = {
        "title": heading,
        "summary": dict(summary or {}),
        "graph_edges": circuit.graph.n_edges,
        **_drawing(layout, set(circuit.without_dead_edges().edges), scores),
    }
    parts = {"TITLE": html.escape(heading), "DATA": _json_for_html(data)}
    template = resources.files(__package__).joinpath("circuit.html").read_text("utf-8")
    page = re.sub("@@(TITLE|DATA)@@", lambda match: parts[match[1]], template)
    write_whole(path, page.encode("utf-8"))


def _edge_weights(circuit: Circuit, weights: Float[Tensor, " edge"]) -> list[float]:
    """The weights of the circuit's own edges, in its order."""
    if weights.shape != (circuit.graph.n_edges,):
        raise ValueError(
            f"weights has shape {list(weights.shape)}, but the graph has {circuit.graph.n_edges} "
            "edges: pass one score per edge of the graph (not of the circuit), in the order of "
            "graph.edges."
        )
    kept = weights.detach()[[circuit.graph.index(name) for name in circuit.edges]]
    if not kept.isfinite().all():
        bad = circuit.edges[int(kept.isfinite().logical_not().nonzero()[0])]
        raise ValueError(f"the weight of edge {bad!r} is not finite: it cannot be ranked.")
    return kept.tolist()


def _drawing(layout: Layout, alive: set[str], scores: list[float] | None) -> dict[str, Any]:
    """What the page's script reads; an edge names its nodes by their places in the list."""
    place = {node.name: i for i, node in enumerate(layout.nodes)}
    present = {edge.kind for edge in layout.edges}
    return {
        "size": [round(layout.width), round(layout.height)],
        "node_size": [round(layout.node_width), NODE_HEIGHT],
        "font_size": FONT_SIZE,
        "weighted": scores is not None,
        "kinds": {kind: KIND_LABELS[kind] for kind in KINDS if kind in present},
        "layer_label_x": LAYER_LABEL_X,
        "layers": [[n, *(round(y, 1) for y in band)] for n, band in layout.layers.items()],
        "groups": [[place[kv], [place[h] for h in heads]] for kv, heads in layout.groups.items()],
        "nodes": [
            {"name": n.name, "kind": n.kind, "at": [round(c, 1) for c in layout.places[n.name]]}
            for n in layout.nodes
        ],
        "edges": [
            {
                "name": edge.name,
                "source": place[edge.source],
                "destination": place[edge.destination],
                "kind": edge.kind,
                "alive": edge.name in alive,
                "weight": None if scores is None else float(f"{scores[i]:.6g}"),
                "curve": [round(c, 1) for point in layout.curves[i] for c in point],
            }
            for i, edge in enumerate(layout.edges)
        ],
    }


def _json_for_html(data: dict[str, Any]) -> str:
    """JSON that no HTML parser can take for markup: `<`, `>` and `&` are written as escapes."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)
