"""Which sources and destinations lead to the logits by kept edges."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph, Read


def lead_to_logits(graph: EdgeGraph, mask: Bool[Tensor, " edge"]) -> Bool[Tensor, "source span"]:
    """Which sources, in which span, have a path of kept edges to the logits (in any span)."""
    alive = torch.zeros(graph.n_sources, graph.n_spans, dtype=torch.bool)
    for read in reversed(graph.reads):
        block = mask[read.edges].view(-1, graph.n_spans, read.n_sources)
        leads = leading(graph, read, alive).view(-1, graph.n_spans, 1)
        alive[: read.n_sources] |= (block & leads).any(0).T
    return alive


def leading(
    graph: EdgeGraph, read: Read, alive: Bool[Tensor, "source span"]
) -> Bool[Tensor, " destination"]:
    """Which destinations of a read flow into a source that leads to the logits.

    Keys and values may be read from every span.
    """
    if read.kind == "logits":
        return torch.ones(graph.n_spans, dtype=torch.bool)
    if read.kind == "mlp":
        return alive[graph.mlp_source(read.layer)]
    first = graph.first_head(read.layer)
    heads = alive[first : first + graph.n_heads]
    groups = heads.view(graph.n_kv_heads, -1).any(1).repeat_interleave(graph.n_spans)
    return torch.cat([heads.flatten(), groups, groups]) if graph.split_qkv else groups


def leading_edges(graph: EdgeGraph, mask: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
    """Which edges, kept or not, end in a destination that leads to the logits by kept edges."""
    alive = lead_to_logits(graph, mask)
    per_read = [
        leading(graph, read, alive).repeat_interleave(read.n_sources) for read in graph.reads
    ]
    return torch.cat(per_read)
