"""A circuit as a networkx graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.names import KIND_LABELS, parse_destination, parse_node, split_edge
from tl_edgeprune.graph.spans import refuse_spans


def to_networkx(graph: EdgeGraph, edges: Iterable[str]) -> Any:
    """The circuit of these edges as a networkx DiGraph, whose paths are those of the model.

    Nodes are sources and destinations by name, with `kind` ("input", "head", "mlp", "logits",
    "query", "key", "value") and `layer`. The circuit's edges have kind="edge". Links of
    kind="inside" lead from a head's query, key and value to the head itself (from a shared key to
    every head of its group), so that a walk can continue.

    Raises:
        ImportError: networkx is not installed.
        ValueError: the graph has spans.
    """
    try:
        import networkx
    except ImportError:
        raise ImportError(
            "Circuit.to_networkx needs networkx: install it with pip install networkx."
        ) from None
    refuse_spans(graph, "Circuit.to_networkx")
    network = networkx.DiGraph()
    for name in ("input", "tok", "pos"):
        if name in graph.sources:
            network.add_node(name, kind="input", layer=-1)
    network.add_node("logits", kind="logits", layer=graph.n_layers)
    for edge in edges:
        source, destination = split_edge(edge)
        for name in (source, destination):
            if name not in network:
                network.add_node(name, **_description(name))
        network.add_edge(source, destination, kind="edge")
        for owner in graph.owner(destination):
            if owner != destination:
                network.add_node(owner, **_description(owner))
                network.add_edge(destination, owner, kind="inside")
    return network


def _description(name: str) -> dict[str, Any]:
    destination = parse_destination(name)
    node = parse_node(destination.node)
    return {"kind": KIND_LABELS.get(destination.port, node.kind), "layer": node.layer}
