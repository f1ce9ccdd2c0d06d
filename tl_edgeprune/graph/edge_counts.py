"""How many edges a circuit has, in this package's count and in the MIB benchmark's.

MIB (and EAP-IG) give every query head a key and a value input of its own, also where heads share
them, and count an edge into each. Here such edges are one, since nothing can be removed from the
one key that heads share for some of them alone. A budget in MIB's count can end inside such a
group of edges: it is then met by the longest run of top edges that fits whole, so that a circuit
has at most the budget, and fewer by less than a group.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.edge_indices import edge_ends

CONVENTIONS = ("graph", "mib")


def edge_counts(graph: EdgeGraph, convention: str) -> Int[Tensor, " edge"]:
    """How many edges each edge counts for: 1, or ("mib") one for each query, key and value input of
    a query head that it reaches.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}: expected 'graph' or 'mib'.")
    if convention == "graph":
        return torch.ones(graph.n_edges, dtype=torch.long)
    inputs = [
        max(1, len(graph.owner(name))) * (3 if name[0] == "a" and not graph.split_qkv else 1)
        for name in graph.destinations
    ]
    return torch.tensor(inputs)[edge_ends(graph)[1]]


def longest_run(ranked: Tensor, counts: Int[Tensor, " edge"], budget: int) -> Bool[Tensor, " edge"]:
    """The longest run of top edges that counts at most `budget`; of equal scores, those first in
    the graph come first.
    """
    order = torch.argsort(ranked.detach().cpu().double(), descending=True, stable=True)
    mask = torch.zeros(len(counts), dtype=torch.bool)
    mask[order[counts[order].cumsum(0) <= budget]] = True
    return mask
