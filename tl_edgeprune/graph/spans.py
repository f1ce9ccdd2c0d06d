"""What takes no graph with spans refuses it here."""

from __future__ import annotations

from tl_edgeprune.graph.edge_graph import EdgeGraph


def refuse_spans(graph: EdgeGraph | None, what: str) -> None:
    """Raise ValueError for a graph with spans."""
    if graph is not None and graph.spans:
        raise ValueError(
            f"{what} takes edges that are the same at every position, and this graph's have masks "
            f"of their own in spans ({', '.join(graph.spans[:8])}): use a graph without "
            "(graph.at(()))."
        )
