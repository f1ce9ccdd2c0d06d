"""The two ends of every edge as indices, for work that gathers by source or destination."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Int
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph


@functools.lru_cache(maxsize=4)
def edge_ends(graph: EdgeGraph, device: torch.device | str = "cpu") -> Int[Tensor, "2 edge"]:
    """Places of each edge's source and destination, `graph.pairs` as rows. Kept: not to be written
    to.
    """
    return torch.tensor(graph.pairs, device=device).T.contiguous()
