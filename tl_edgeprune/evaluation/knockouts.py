"""Completeness and minimality of a circuit: what remains when nodes of it are knocked out.

F is the mean of a measure over the task's pairs, C the circuit, M the full model. Knocking out a
set of nodes K removes every edge that leaves one of them.

- Completeness: for every K within the circuit, C without K should do as M without K does. The
  incompleteness score of K is |F(C \\ K) - F(M \\ K)|; sets are drawn at random, or grown greedily
  to make it large.
- Minimality: every node v of the circuit should matter, at least when some others K are gone. Its
  score is |F(C \\ (K and v)) - F(C \\ K)|.

Wang et al. 2022, "Interpretability in the Wild", section 4.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.metadata import ablation_of
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.edge_indices import edge_ends
from tl_edgeprune.objectives import Objective, find_measure
from tl_edgeprune.runs.circuit_runs import measure_circuits
from tl_edgeprune.runs.provenance import check_origin
from tl_edgeprune.tasks.task import Task


class Knockout(NamedTuple):
    """F of the circuit and of the full model without these nodes."""

    nodes: tuple[str, ...]
    circuit: float
    model: float

    @property
    def incompleteness(self) -> float:
        """|F(C without K) - F(M without K)|, in units of the measure."""
        return abs(self.circuit - self.model)


@dataclass(frozen=True, repr=False)
class Completeness:
    """Knockouts, with F of the whole circuit and of the full model (nothing knocked out)."""

    circuit: float
    model: float
    knockouts: tuple[Knockout, ...]

    @property
    def worst(self) -> Knockout:
        """The knockout of highest incompleteness; that of no nodes is among those compared."""
        return _worst([Knockout((), self.circuit, self.model), *self.knockouts])

    def __repr__(self) -> str:
        worst = self.worst
        return (
            f"Completeness({len(self.knockouts)} knockouts of F(circuit) {self.circuit:z.3g} and "
            f"F(model) {self.model:z.3g}, worst incompleteness {worst.incompleteness:.3g} without "
            f"{', '.join(worst.nodes) or 'no node'})"
        )


@dataclass(frozen=True, repr=False)
class Minimality:
    """How much each node (or edge) matters: |F(C without K and v) - F(C without K)|.

    scores: by name, in units of the measure. circuit, model: F(C) and F(M).
    """

    scores: Mapping[str, float]
    circuit: float
    model: float

    @property
    def relative(self) -> dict[str, float]:
        """Scores as shares of |F(M)|. Raises ValueError where F(M) is 0 (KL, squared error)."""
        if self.model == 0:
            raise ValueError(
                "the measure of the full model is 0, so scores are no shares of it: use .scores, "
                "or measure='logit-diff'."
            )
        return {name: score / abs(self.model) for name, score in self.scores.items()}

    @property
    def least(self) -> str:
        """The name of the lowest score: what the circuit needs least. Raises ValueError where there
        is none.
        """
        if not self.scores:
            raise ValueError("the circuit has no heads and MLPs, so none of them is the least.")
        return min(self.scores, key=lambda name: self.scores[name])

    def __repr__(self) -> str:
        ends = f"F(circuit) {self.circuit:z.3g}, F(model) {self.model:z.3g}"
        if not self.scores:
            return f"Minimality(no scores, {ends})"
        largest = max(self.scores, key=lambda name: self.scores[name])
        (low, high), low_score = (self.least, largest), self.scores[self.least]
        return (
            f"Minimality({len(self.scores)} scores from {low_score:.3g} ({low}) to "
            f"{self.scores[high]:.3g} ({high}), {ends})"
        )


def completeness(
    model: Any,
    circuit: Circuit,
    task: Task,
    *,
    n_random: int = 10,
    n_greedy: int = 0,
    greedy_size: int = 5,
    candidates: int = 5,
    measure: str | Objective | None = None,
    ablation: Ablation | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Completeness:
    """Incompleteness scores of random and of greedily grown sets of the circuit's nodes.

    Args:
        n_random: sets drawn at random; each node (but the inputs) is in with probability one half.
        n_greedy: sets grown greedily: at each of `greedy_size` rounds, of `candidates` random nodes
            the one that makes the incompleteness score largest is added (Wang et al., algorithm 1).
        measure: as in `faithfulness_curve`: minus an objective, by default the logit difference.
        ablation: the circuit's own by default, else counterfactual.

    Two masked forwards a set (a candidate) and batch. Raises ValueError for a circuit without heads
    and MLPs, or of another graph.
    """
    runs = _Runs.of(model, circuit, task, measure, ablation, batch_size)
    nodes = inner_nodes(circuit)
    if not nodes:
        raise ValueError("the circuit has no heads or MLPs, so none can be knocked out.")
    generator = random.Random(seed)
    sets = [[node for node in nodes if generator.random() < 0.5] for _ in range(n_random)]
    unchanged, *sampled = runs.knockouts(circuit, [(), *sets])
    for _ in range(n_greedy):
        grown = unchanged
        for _ in range(min(greedy_size, len(nodes))):
            remaining = [node for node in nodes if node not in grown.nodes]
            tried = generator.sample(remaining, min(candidates, len(remaining)))
            grown = _worst(runs.knockouts(circuit, [(*grown.nodes, node) for node in tried]))
        sampled.append(grown)
    return Completeness(unchanged.circuit, unchanged.model, tuple(sampled))


def minimality(
    model: Any,
    circuit: Circuit,
    task: Task,
    *,
    without: Mapping[str, Collection[str]] | None = None,
    edges: bool = False,
    measure: str | Objective | None = None,
    ablation: Ablation | None = None,
    batch_size: int = 16,
) -> Minimality:
    """How much each node of the circuit (or each edge, with `edges`) changes F when it goes.

    Args:
        without: by name of a node (or edge), the nodes K that are knocked out first; K is empty
            for those that are not named. Nodes that stand in for one another only show their worth
            when the others are gone.
        measure, ablation: as in `completeness`.

    Raises KeyError for unknown names in `without`.
    """
    without = without or {}
    graph = circuit.graph
    names = circuit.edges if edges else inner_nodes(circuit)
    unknown = set(without) - set(names)
    if unknown:
        raise KeyError(f"without={sorted(unknown)}: not in the circuit, which has {names}.")
    runs = _Runs.of(model, circuit, task, measure, ablation, batch_size)
    with_node = [knock_out(circuit.mask, graph, without.get(name, ())) for name in names]
    without_node = [
        cut_edge(mask, graph.index(name)) if edges else knock_out(mask, graph, [name])
        for mask, name in zip(with_node, names, strict=True)
    ]
    full = torch.ones_like(circuit.mask)
    of_full, of_circuit, *values = runs.means([full, circuit.mask, *with_node, *without_node])
    pairs = zip(names, values[: len(names)], values[len(names) :], strict=True)
    return Minimality({name: abs(b - a) for name, b, a in pairs}, of_circuit, of_full)


def inner_nodes(circuit: Circuit) -> tuple[str, ...]:
    """The circuit's heads and MLPs: its nodes without the inputs."""
    inputs = circuit.graph.sources[: circuit.graph.n_inputs]
    return tuple(node for node in circuit.nodes if node not in inputs)


def knock_out(
    mask: Bool[Tensor, " edge"], graph: EdgeGraph, nodes: Iterable[str]
) -> Bool[Tensor, " edge"]:
    """The mask without the edges that leave these nodes. Raises KeyError for an unknown node."""
    index_of = {name: index for index, name in enumerate(graph.sources)}
    removed = torch.zeros(graph.n_sources, dtype=torch.bool)
    for node in nodes:
        if node not in index_of:
            raise KeyError(f"unknown node {node!r}: this graph has {', '.join(graph.sources)}.")
        removed[index_of[node]] = True
    return mask & ~removed[edge_ends(graph)[0]]


def cut_edge(mask: Bool[Tensor, " edge"], edge: int) -> Bool[Tensor, " edge"]:
    """The mask without the edge of this index."""
    cut = mask.clone()
    cut[edge] = False
    return cut


def _worst(knockouts: Iterable[Knockout]) -> Knockout:
    return max(knockouts, key=lambda knockout: knockout.incompleteness)


@dataclass(frozen=True)
class _Runs:
    """Mean measures of masks, all under the same settings."""

    model: Any
    graph: EdgeGraph
    task: Task
    objective: Objective
    ablation: Ablation | None
    batch_size: int

    @classmethod
    def of(
        cls,
        model: Any,
        circuit: Circuit,
        task: Task,
        measure: str | Objective | None,
        ablation: Ablation | None,
        batch_size: int,
    ) -> _Runs:
        check_origin(model, circuit.graph, circuit.metadata)
        kind = ablation_of(circuit.metadata) if ablation is None else ablation
        return cls(model, circuit.graph, task, find_measure(measure, task), kind, batch_size)

    def means(self, masks: Sequence[Bool[Tensor, " edge"]]) -> list[float]:
        measured = measure_circuits(
            self.model,
            self.graph,
            masks,
            self.task,
            self.objective,
            ablation=self.ablation,
            batch_size=self.batch_size,
        )
        return measured.circuits.mean(1).tolist()

    def knockouts(self, circuit: Circuit, sets: Sequence[Sequence[str]]) -> list[Knockout]:
        full = torch.ones_like(circuit.mask)
        masks_of_pair = (circuit.mask, full)
        masks = [knock_out(mask, self.graph, nodes) for nodes in sets for mask in masks_of_pair]
        means = self.means(masks)
        rows = zip(sets, means[::2], means[1::2], strict=True)
        return [Knockout(tuple(nodes), of_circuit, of_full) for nodes, of_circuit, of_full in rows]
