"""Paths of kept edges: what the input reaches, and what reaches the logits.

A mask's edges are followed read by read, forwards for `reached_from_input` and backwards for
`lead_to_logits`. Queries and MLPs act where they read. Keys and values are read from every later
position, so in a graph with spans a path changes its span only through them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph, Read


def alive_edges(graph: EdgeGraph, mask: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
    """The kept edges that are on a path of kept edges from the input to the logits."""
    reached = reached_from_input(graph, mask).T  # [span, source]
    source_reached = [
        reached[:, : read.n_sources].repeat(read.n_destinations // graph.n_spans, 1).flatten()
        for read in graph.reads
    ]
    return mask & torch.cat(source_reached) & leading_edges(graph, mask)


def reached_from_input(
    graph: EdgeGraph, mask: Bool[Tensor, " edge"]
) -> Bool[Tensor, "source span"]:
    """Which sources, in which span, have a path of kept edges from the input (of any span)."""
    reached = torch.zeros(graph.n_sources, graph.n_spans, dtype=torch.bool)
    reached[: graph.n_inputs] = True
    for read in graph.reads:
        block = mask[read.edges].view(-1, graph.n_spans, read.n_sources)
        entered = (block & reached[: read.n_sources].T).any(-1)  # [destination, span]
        if read.kind == "mlp":
            reached[graph.mlp_source(read.layer)] = entered[0]
        elif read.kind == "attention":
            first = graph.first_head(read.layer)
            reached[first : first + graph.n_heads] = _heads_entered(graph, entered)
    return reached


def _heads_entered(
    graph: EdgeGraph, entered: Bool[Tensor, "destination span"]
) -> Bool[Tensor, "head span"]:
    """Which heads, in which span, an entered destination of their layer flows into."""
    if not graph.split_qkv:
        return entered.any(1, keepdim=True).expand_as(entered)
    queries, keys, values = entered.split([graph.n_heads, graph.n_kv_heads, graph.n_kv_heads])
    groups = (keys | values).any(1, keepdim=True)  # [group, 1]
    return queries | groups.repeat_interleave(graph.n_heads // graph.n_kv_heads, 0)


def lead_to_logits(graph: EdgeGraph, mask: Bool[Tensor, " edge"]) -> Bool[Tensor, "source span"]:
    """Which sources, in which span, have a path of kept edges to the logits (in any span)."""
    leads = torch.zeros(graph.n_sources, graph.n_spans, dtype=torch.bool)
    for read in reversed(graph.reads):
        block = mask[read.edges].view(-1, graph.n_spans, read.n_sources)
        destinations = destinations_reaching_logits(graph, read, leads).view(-1, graph.n_spans, 1)
        leads[: read.n_sources] |= (block & destinations).any(0).T
    return leads


def destinations_reaching_logits(
    graph: EdgeGraph, read: Read, leads: Bool[Tensor, "source span"]
) -> Bool[Tensor, " destination"]:
    """Which destinations of a read flow into a source that leads to the logits.

    Args:
        graph: the graph.
        read: the read whose destinations are asked about.
        leads: which sources lead to the logits, as `lead_to_logits` gives them.
    """
    if read.kind == "logits":
        return torch.ones(graph.n_spans, dtype=torch.bool)
    if read.kind == "mlp":
        return leads[graph.mlp_source(read.layer)]
    first = graph.first_head(read.layer)
    heads = leads[first : first + graph.n_heads]
    groups = heads.view(graph.n_kv_heads, -1).any(1).repeat_interleave(graph.n_spans)
    return torch.cat([heads.flatten(), groups, groups]) if graph.split_qkv else groups


def leading_edges(graph: EdgeGraph, mask: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
    """Which edges, kept or not, end in a destination that leads to the logits by kept edges."""
    leads = lead_to_logits(graph, mask)
    blocks = [
        destinations_reaching_logits(graph, read, leads).repeat_interleave(read.n_sources)
        for read in graph.reads
    ]
    return torch.cat(blocks)
