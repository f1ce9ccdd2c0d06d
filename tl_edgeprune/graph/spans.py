"""The refusal of graphs with spans, for everything that cannot handle them."""

from __future__ import annotations

from tl_edgeprune.graph.edge_graph import EdgeGraph


def refuse_spans(graph: EdgeGraph | None, what: str) -> None:
    """Raise ValueError if the graph has spans.

    Args:
        graph: None is accepted.
        what: the caller, which begins the message.
    """
    if graph is not None and graph.spans:
        raise ValueError(
            f"{what} takes edges that are the same at every position, and this graph has a mask "
            f"per span ({', '.join(graph.spans[:8])}): use one without, graph.at(())."
        )
