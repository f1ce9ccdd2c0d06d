"""Scores of edges: one flat tensor, and the circuits that follow from it.

A score above 0 says that removing the edge raises the loss. Attribution scores are effects, ranked
by magnitude; log alphas and other learned rankings are ranked as they are.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save as to_bytes
from torch import Tensor

from tl_edgeprune.circuits.circuit import Circuit, check_budget, check_scores
from tl_edgeprune.circuits.mib import read_scores, write_scores
from tl_edgeprune.graph.edge_counts import edge_counts, longest_run
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.utils.reading import AGAIN, check_type, of_format, reporting_damage
from tl_edgeprune.utils.tensor_files import floats, read_tensors
from tl_edgeprune.utils.versions import versions
from tl_edgeprune.utils.writing import write_whole

FORMAT = 1
KIND = "tl_edgeprune scores"
HINT = "Expected one written by EdgeScores.save."


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """One score per edge of a graph, and their origin.

    Args:
        graph: the edges.
        tensor: their scores, in flat order [edge].
        metadata: plain JSON values, such as method, model, task and seed.
        by_magnitude: whether edges are ranked by the magnitude of the score (effects, as of EAP) or
            by the score itself (log alphas, of which the lowest are removed first).

    Raises:
        ValueError: scores of another length, NaN or infinite.
    """

    graph: EdgeGraph
    tensor: Float[Tensor, " edge"]
    metadata: dict[str, Any] = field(default_factory=dict)
    by_magnitude: bool = True

    def __post_init__(self) -> None:
        check_scores(self.tensor, self.graph)

    # ------------------------------------------------------------------------------------ circuits

    def top(
        self,
        k: int,
        *,
        absolute: bool | None = None,
        alive: bool = False,
        convention: str = "graph",
    ) -> Circuit:
        """The k edges of highest score; of equal ones, the first in the graph.

        Args:
            k: edges to take, from 1 to the graph's.
            absolute: rank by magnitude or by the signed score; None: as `by_magnitude` says.
            alive: leave out chosen edges on no path from the input to the logits; fewer than k may
                remain.
            convention: "mib" counts edges as MIB does (see `graph.edge_counts`) and gives at most k
                of its edges.

        Raises:
            ValueError: a k outside the graph.
        """
        ranking = self.ranking(absolute)
        if convention == "graph":
            circuit = Circuit.top(self.graph, ranking, k, **self.metadata)
        else:
            counts = edge_counts(self.graph, convention)
            check_budget(k, self.graph, int(counts.sum()))
            circuit = Circuit(self.graph, longest_run(ranking, counts, k), dict(self.metadata))
        return circuit.without_dead_edges() if alive else circuit

    def threshold(self, t: float, *, absolute: bool | None = None, alive: bool = False) -> Circuit:
        """The edges whose score is at least t. Warns if that is no edge or every edge.

        Args:
            t: the lowest score to keep.
            absolute, alive: as for `top`.

        Raises:
            ValueError: t is NaN.
        """
        if math.isnan(t):
            raise ValueError("threshold(nan): expected a number, the lowest score to keep.")
        ranking = self.ranking(absolute)
        mask = ranking >= t
        if bool(mask.all()) or not bool(mask.any()):
            warnings.warn(
                f"threshold({t:g}) keeps {'every' if mask.any() else 'no'} edge: the scores go "
                f"from {float(ranking.min()):.3g} to {float(ranking.max()):.3g}. Choose a "
                "threshold between, or a size with top(k).",
                stacklevel=2,
            )
        circuit = Circuit(self.graph, mask, dict(self.metadata))
        return circuit.without_dead_edges() if alive else circuit

    def greedy(self, k: int, *, absolute: bool | None = None, alive: bool = False) -> Circuit:
        """k edges chosen greedily from the logits backwards, so that each leads to the logits.

        Each step takes the edge of highest score among those into the logits or into a node that a
        chosen edge leaves; of equal ones, the first in the graph. Some edges may not be reached
        from the input. Hanna, Pezzelle and Belinkov 2024, "Have Faith in Faithfulness", section 3.

        Args:
            k: edges to take, from 1 to the graph's.
            absolute, alive: as for `top`.

        Raises:
            ValueError: a k outside the graph.
        """
        check_budget(k, self.graph)
        mask = torch.zeros(self.graph.n_edges, dtype=torch.bool)
        mask[_greedy_order(self.graph, self.ranking(absolute).tolist(), k)] = True
        circuit = Circuit(self.graph, mask, dict(self.metadata))
        return circuit.without_dead_edges() if alive else circuit

    def ranking(self, absolute: bool | None = None) -> Float[Tensor, " edge"]:
        """What edges are ranked by: the scores or their magnitudes (on the CPU)."""
        absolute = self.by_magnitude if absolute is None else absolute
        scores = self.tensor.detach().cpu()
        return scores.abs() if absolute else scores

    def __getitem__(self, edge: str) -> float:
        return float(self.tensor[self.graph.index(edge)])

    def __repr__(self) -> str:
        method = self.metadata.get("method", "")
        return f"EdgeScores({method}{', ' if method else ''}{self.graph.n_edges:,} edges)"

    # ------------------------------------------------------------------------------------ on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write safetensors with graph, metadata and versions, atomically."""
        document = {
            "format": FORMAT,
            "kind": KIND,
            "graph": self.graph.to_dict(),
            "by_magnitude": self.by_magnitude,
            "metadata": self.metadata,
            "versions": versions(),
        }
        tensors = {"scores": self.tensor.detach().cpu().contiguous()}
        content = to_bytes(tensors, {"tl_edgeprune": json.dumps(document)})
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EdgeScores:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no file.
            ValueError: a damaged file, or one of another format.
        """
        file_type, advice = "file of scores", f"{AGAIN}, or score the edges again"
        tensors, document = read_tensors(path, "tl_edgeprune", file_type, HINT)
        of_format(document, path, file_type, kind=KIND, format=FORMAT, hint=HINT, again=advice)
        with reporting_damage(path):
            graph = EdgeGraph.from_dict(document["graph"])
            metadata = check_type(document["metadata"], dict, "metadata")
            by_magnitude = check_type(document["by_magnitude"], bool, "by_magnitude")
            scores = floats(tensors, "scores", (graph.n_edges,))
            return cls(graph, scores, metadata, by_magnitude)

    # ------------------------------------------------------------------------------ other formats

    def to_mib(self, path: str | os.PathLike[str], *, d_model: int | None = None) -> None:
        """Write the scores as EAP-IG and the MIB benchmark read them: see `circuits.mib`."""
        write_scores(path, self.graph, self.tensor, self.by_magnitude, self.metadata, d_model)

    @classmethod
    def from_mib(
        cls, path: str | os.PathLike[str], graph: EdgeGraph, *, shared: str = "same"
    ) -> EdgeScores:
        """Read the scores in a file of EAP-IG or MIB: see `circuits.mib.read_scores`."""
        return cls(graph, *read_scores(path, graph, shared))


def _greedy_order(graph: EdgeGraph, scores: list[float], k: int) -> list[int]:
    """Flat indices of k edges, in the order in which the greedy construction takes them."""
    incoming = [  # the edges of each destination, which are contiguous
        range(
            read.edges.start + row * read.n_sources, read.edges.start + (row + 1) * read.n_sources
        )
        for read in graph.reads
        for row in range(read.n_destinations)
    ]
    spans = graph.n_spans
    fed_by: list[list[int]] = [[] for _ in range(graph.n_sources * spans)]  # what feeds a node
    for destination, nodes in enumerate(graph.flows_into):
        for node in nodes:
            fed_by[node].append(destination)
    heap = [(-scores[edge], edge) for logits in graph.outputs for edge in incoming[logits]]
    heapq.heapify(heap)
    reached = {*graph.outputs}
    chosen: list[int] = []
    while heap and len(chosen) < k:
        _, edge = heapq.heappop(heap)
        chosen.append(edge)
        source, at = graph.pairs[edge]
        for destination in fed_by[source * spans + at % spans]:
            if destination not in reached:
                reached.add(destination)
                for next_edge in incoming[destination]:
                    heapq.heappush(heap, (-scores[next_edge], next_edge))
    return chosen
