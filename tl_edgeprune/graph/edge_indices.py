"""Source and destination of every edge as indices, to gather and add up by either."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Int
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph


@functools.lru_cache(maxsize=4)
def edge_ends(graph: EdgeGraph, device: torch.device | str = "cpu") -> Int[Tensor, "2 edge"]:
    """Indices of each edge's source (row 0) and destination (row 1): `graph.pairs` as a tensor.

    Cached and shared: do not modify.
    """
    return torch.tensor(graph.pairs, device=device).T.contiguous()
