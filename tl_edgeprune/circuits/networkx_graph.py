"""A circuit as a networkx graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.spans import refuse_spans


def to_networkx(graph: EdgeGraph, edges: Iterable[str]) -> Any:
    """The circuit of these edges as a networkx DiGraph, whose paths are those of the model.

    Nodes are sources and destinations by name, with `kind` ("input", "head", "mlp", "logits",
    "query", "key", "value", "head-input") and `layer`. The circuit's edges have kind="edge"; links
    of kind="inside" lead from a head's query, key and value to the head itself (a shared key to
    every head of its group), so that a walk can go on.

    Raises ImportError where networkx is not installed, ValueError for a circuit with spans.
    """
    try:
        import networkx
    except ImportError:
        raise ImportError(
            "Circuit.to_networkx needs networkx: install it with pip install networkx."
        ) from None
    refuse_spans(graph, "Circuit.to_networkx")
    directed = networkx.DiGraph()
    for name in ("input", "tok", "pos"):
        if name in graph.sources:
            directed.add_node(name, kind="input", layer=-1)
    directed.add_node("logits", kind="logits", layer=graph.n_layers)
    for edge in edges:
        source, _, destination = edge.partition("->")
        for name in (source, destination):
            if name not in directed:
                directed.add_node(name, **_description(name))
        directed.add_edge(source, destination, kind="edge")
        for owner in graph.owner(destination):
            if owner != destination:
                directed.add_node(owner, **_description(owner))
                directed.add_edge(destination, owner, kind="inside")
    return directed


def _description(name: str) -> dict[str, Any]:
    node, _, kind = name.partition("<")
    layer = int(node.partition(".")[0][1:])
    kinds = {"q>": "query", "k>": "key", "v>": "value"}
    return {"kind": kinds.get(kind, "head" if node[0] == "a" else "mlp"), "layer": layer}
