"""A ranking or a circuit against one that is known: ROC curve, AUC, precision and recall.

Edges are judged as they are; a node is in a circuit if an edge of the circuit leaves it or leads to
it, and its score is the highest of all edges that leave it or lead to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.graph.edge_graph import EdgeGraph


@dataclass(frozen=True)
class Roc:
    """True against false positives as the threshold falls, from (0, 0) to (1, 1).

    auc: the area under it; the chance that a known edge outranks another one, ties counting half.
    """

    false_positive: tuple[float, ...]
    true_positive: tuple[float, ...]
    auc: float

    def __str__(self) -> str:
        return f"AUC {self.auc:.3f}"


class PrecisionRecall(NamedTuple):
    """precision: share of what was found that is known. recall: share of the known that was found.

    The precision of nothing is 1, the recall of nothing known is 1.
    """

    precision: float
    recall: float


def roc(
    scores: EdgeScores, known: Circuit, *, level: str = "edge", absolute: bool | None = None
) -> Roc:
    """How well a ranking tells the edges (or nodes) of a known circuit from the others.

    level: "edge" or "node". absolute: rank by magnitude, or by signed score; None for what
    fits the scores (learned ones are taken as they are).

    Raises ValueError for circuits of another graph, an unknown level, and where the known circuit
    has all edges (nodes) or none: there is nothing to tell apart.
    """
    _check(scores.graph, known.graph, level)
    ranked = scores.ranking(absolute)
    ranked, positive = ranked.detach().cpu().double(), known.mask
    if level == "node":
        ranked = node_scores(ranked, known.graph)
        positive = _nodes(known)
    if bool(positive.all()) or not bool(positive.any()):
        raise ValueError(
            f"the known circuit has {int(positive.sum())} of the graph's {len(positive)} {level}s: "
            "a ROC curve needs some in it and some outside."
        )
    return roc_of(ranked, positive)


def roc_of(ranked: Float[Tensor, " item"], wanted: Bool[Tensor, " item"]) -> Roc:
    """The ROC curve of scores; items of equal score come in at once."""
    thresholds, group = ranked.unique(return_inverse=True)
    order = len(thresholds) - 1 - group  # 0 for the highest score
    curves = []
    for chosen in (~wanted, wanted):
        counts = torch.zeros(len(thresholds) + 1, dtype=torch.double)
        counts.index_add_(0, order[chosen] + 1, torch.ones(int(chosen.sum()), dtype=torch.double))
        curves.append(counts.cumsum(0) / int(chosen.sum()))
    false_positive, true_positive = curves
    auc = float(torch.trapezoid(true_positive, false_positive))
    return Roc(tuple(false_positive.tolist()), tuple(true_positive.tolist()), auc)


def precision_recall(circuit: Circuit, known: Circuit, *, level: str = "edge") -> PrecisionRecall:
    """Precision and recall of a circuit's edges (or nodes) against those of a known one.

    level: "edge" or "node". Raises ValueError for circuits of different graphs.
    """
    _check(circuit.graph, known.graph, level)
    predicted, positive = circuit.mask, known.mask
    if level == "node":
        predicted, positive = _nodes(circuit), _nodes(known)
    n_true = int((predicted & positive).sum())
    return PrecisionRecall(
        n_true / int(predicted.sum()) if bool(predicted.any()) else 1.0,
        n_true / int(positive.sum()) if bool(positive.any()) else 1.0,
    )


def node_scores(ranked: Float[Tensor, " edge"], graph: EdgeGraph) -> Float[Tensor, " source"]:
    """The highest score of the edges that leave a node or lead to it."""
    index_of = {name: index for index, name in enumerate(graph.sources)}
    owners = [[index_of[name] for name in graph.owner(d)] for d in graph.destinations]
    ends = [(edge, s) for edge, (s, _) in enumerate(graph.pairs)]
    ends += [(edge, node) for edge, (_, d) in enumerate(graph.pairs) for node in owners[d]]
    edges, nodes = torch.tensor(ends).T
    highest = torch.full((graph.n_sources,), -torch.inf, dtype=ranked.dtype)
    return highest.scatter_reduce(0, nodes, ranked[edges], "amax")


def _nodes(circuit: Circuit) -> Bool[Tensor, " source"]:
    in_circuit = set(circuit.nodes)
    return torch.tensor([name in in_circuit for name in circuit.graph.sources])


def _check(graph: EdgeGraph, known: EdgeGraph, level: str) -> None:
    if graph != known:
        raise ValueError(f"the known circuit is of another graph: {known}, expected {graph}.")
    if level not in ("edge", "node"):
        raise ValueError(f"unknown level {level!r}: expected 'edge' or 'node'.")
