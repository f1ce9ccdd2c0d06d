"""Scores of edges: one flat tensor, and the circuits that it gives.

A score above 0 says that removing the edge raises the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.circuit import Circuit
from tl_edgeprune.graph import EdgeGraph


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """One score per edge of a graph, in flat order, and where they came from."""

    graph: EdgeGraph
    tensor: Float[Tensor, " edge"]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tensor.shape != (self.graph.n_edges,):
            raise ValueError(
                f"scores of shape {tuple(self.tensor.shape)} for {self.graph.n_edges} edges."
            )
        if not bool(torch.isfinite(self.tensor).all()):
            raise ValueError("scores hold NaN or infinite values.")

    def top(self, k: int, *, absolute: bool = True) -> Circuit:
        """The k edges of highest score, by magnitude unless `absolute=False`."""
        ranked = self.tensor.abs() if absolute else self.tensor
        return Circuit.top(self.graph, ranked, k, **self.metadata)

    def threshold(self, t: float, *, absolute: bool = True) -> Circuit:
        """The edges whose score (its magnitude) is at least t."""
        ranked = self.tensor.abs() if absolute else self.tensor
        return Circuit(self.graph, (ranked >= t).cpu(), dict(self.metadata))

    def __getitem__(self, edge: str) -> float:
        return float(self.tensor[self.graph.index(edge)])

    def __repr__(self) -> str:
        method = self.metadata.get("method", "")
        return f"EdgeScores({method}{', ' if method else ''}{self.graph.n_edges:,} edges)"
