"""How many edges a circuit has, in this package's count and in the MIB benchmark's.

MIB (and EAP-IG) give every query head a key and a value input, even if heads share them, and count
an edge into each. Here those edges are one, since a shared key cannot be changed for only some of
its heads. A budget in MIB's count can end inside such a group of edges. Then the circuit is the
longest run of top edges whose groups fit whole: it has at most the budget, and falls short of it by
less than a group.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.edge_indices import edge_ends

CONVENTIONS = ("graph", "mib")


def edge_counts(graph: EdgeGraph, convention: str) -> Int[Tensor, " edge"]:
    """How many edges each edge counts for.

    Args:
        graph: the graph.
        convention: "graph" counts every edge once; "mib" counts an edge once for each query, key
            and value input of a query head that it enters.

    Raises:
        ValueError: an unknown convention.
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
    """The longest run of top edges that counts at most `budget`.

    Args:
        ranked: what edges are ranked by; of equal ones, the first in the graph comes first.
        counts: how many edges each edge counts for, from `edge_counts`.
        budget: the largest count.
    """
    order = torch.argsort(ranked.detach().cpu().double(), descending=True, stable=True)
    mask = torch.zeros(len(counts), dtype=torch.bool)
    mask[order[counts[order].cumsum(0) <= budget]] = True
    return mask
