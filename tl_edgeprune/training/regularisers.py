"""Penalties on the shape of a circuit, beside its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.edge_indices import edge_ends


@dataclass(frozen=True)
class Attachment:
    """A price on open edges, lower for edges between nodes that are already well connected.

    weight * mean over edges of P(open) * (1 / (1 + d_source) + 1 / (1 + d_destination)) / 2, with
    d the expected number of open edges at that end. Well-connected nodes keep and gain edges, the
    others lose theirs: preferential attachment, after NeuroPrune (Dhurandhar et al. 2024).
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"Attachment(weight={self.weight}): expected a number of 0 or more.")

    def __call__(self, open_share: Float[Tensor, " edge"], graph: EdgeGraph) -> Float[Tensor, ""]:
        """The price of gates open with these probabilities; no gradient flows into the degrees."""
        ends = edge_ends(graph, open_share.device)
        detached = open_share.detach()
        price = torch.zeros_like(detached)  # [edge]
        for end, count in zip(ends, (graph.n_sources, len(graph.destinations)), strict=True):
            degree = detached.new_zeros(count).index_add_(0, end, detached)
            price += 0.5 / (1 + degree[end])
        return self.weight * (open_share * price).mean()
