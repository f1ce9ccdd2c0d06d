"""Three tests of the hypothesis that a circuit is the model's mechanism for a task.

s(C), s(M) are scores of the circuit and of the full model on a prompt pair (higher is better), by
default the logit difference. In each test the null hypothesis is that the circuit is what it
claims to be; a small p-value says that it is not. A large one proves nothing: a test on few pairs
rejects nothing.

1. Equivalence (`sign_test`). H0: |P(s(C) > s(M)) - 1/2| <= epsilon, neither does better than the
   other on clearly more than half of the pairs. Two-sided.
2. Independence (`hsic_test`). H0: s(complement) and s(M) are independent: without the circuit's
   edges, what the model scores says nothing about what it scores with them. One-sided, by
   permutations.
3. Minimality (`minimality_test`). H0, for each edge: its removal changes the circuit's score more
   than that of an edge on a random path added to it does, in at least a share `quantile` of the
   random paths. One-sided, binomial.

Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs" (arXiv 2410.13032), the three
idealised tests; what is said here to be theirs was checked against their code (`circuitry`). Theirs
are the hypotheses, the statistics, epsilon = 0.1, quantile = 0.9, 1,000 permutations, 100 random
paths and how a path is drawn. Ours are:

- ties in the sign test (they leave scores that are equal on every pair out of its scope), and its
  share of pairs: their code puts the mean difference of scores where its description has that
  share;
- a kernel width for each of the two scores, where they share one, the median of all |x_i - y_j|,
  which grows with the distance between the two scores' means;
- p-values of permutations that count the data itself, and so are never 0;
- effects as root mean squares, in the scores' unit (theirs are their squares, and compare alike);
- Holm's correction for the number of edges in place of Bonferroni's (it rejects all that
  Bonferroni's does).

Their two flexible tests, which compare a circuit with random ones, are not here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.metadata import ablation_of
from tl_edgeprune.evaluation.knockouts import cut_edge
from tl_edgeprune.evaluation.statistics import (
    EquivalenceTest,
    IndependenceTest,
    _spread,
    exceedance_test,
    holm,
    hsic_test,
    sign_test,
)
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.spans import refuse_spans
from tl_edgeprune.objectives import Objective, find_measure
from tl_edgeprune.runs.circuit_runs import PerPair, measure_circuits
from tl_edgeprune.runs.provenance import check_origin
from tl_edgeprune.tasks.task import Task

TIE = 1e-4
"""Scores that are no further apart are equal: masked runs in float32 differ by as much."""


@dataclass(frozen=True, repr=False)
class MinimalityTest:
    """For each edge, the p-value of the hypothesis that it matters more than spare edges do.

    effects: root mean square over pairs of s(C) - s(C without the edge). spare_effects: the same of
    random added edges, from circuits with a path more. p_values: corrected for the number of edges
    (Holm).
    """

    edges: tuple[str, ...]
    effects: tuple[float, ...]
    p_values: tuple[float, ...]
    spare_effects: tuple[float, ...]
    quantile: float

    @property
    def p_value(self) -> float:
        """Of the hypothesis that every edge matters: the smallest of the corrected ones."""
        return min(self.p_values)

    def spare(self, level: float = 0.05) -> tuple[str, ...]:
        """The edges whose hypothesis is rejected: removing them does no more than a spare's."""
        return tuple(e for e, p in zip(self.edges, self.p_values, strict=True) if p <= level)

    def __repr__(self) -> str:
        return (
            f"MinimalityTest(p = {self.p_value:.3g}, {len(self.spare())} of {len(self.edges)} "
            f"edges spare at 0.05, {len(self.spare_effects)} spare effects)"
        )


# ------------------------------------------------------------------------------- on a model


def equivalence_test(
    model: Any,
    circuit: Circuit,
    task: Task,
    *,
    epsilon: float = 0.1,
    tie: float = TIE,
    measure: str | Objective | None = None,
    ablation: Ablation | None = None,
    batch_size: int = 16,
) -> EquivalenceTest:
    """Whether circuit and model do equally well: neither is better on clearly more pairs.

    Args:
        epsilon: how far from 1/2 the share of pairs may be.
        tie: scores that are no further apart count as equal.
        measure: as in `faithfulness_curve`. With a distance to the model (KL, squared error) the
            circuit can only tie or lose.
        ablation: the circuit's own by default, else counterfactual.
    """
    measured = _measured(model, circuit, [circuit.mask], task, measure, ablation, batch_size)
    return sign_test(measured.circuits[0] - measured.full, epsilon=epsilon, tie=tie)


def independence_test(
    model: Any,
    circuit: Circuit,
    task: Task,
    *,
    permutations: int = 1000,
    tie: float = TIE,
    measure: str | Objective | None = None,
    ablation: Ablation | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> IndependenceTest:
    """Whether what lies outside the circuit (every other edge) knows nothing of the model's score.

    The measure must vary over pairs in the full model, as the logit difference does; KL and squared
    error do not, and are refused (ValueError). Under counterfactual ablation the complement also
    reads the corrupted prompts: where these depend on the clean ones, so may its scores.
    """
    if len(task) < 2:
        raise ValueError(f"independence_test on {len(task)} pair: give two or more.")
    complement = ~circuit.mask
    measured = _measured(model, circuit, [complement], task, measure, ablation, batch_size)
    if _spread(measured.full) <= tie:
        raise ValueError(
            "the full model's score is the same on every pair, so nothing can depend on it: "
            "choose a measure that varies, such as 'logit-diff' (it needs answers and distractors)."
        )
    return hsic_test(
        measured.circuits[0], measured.full, permutations=permutations, tie=tie, seed=seed
    )


def minimality_test(
    model: Any,
    circuit: Circuit,
    task: Task,
    *,
    edges: Sequence[str] | None = None,
    n_random: int = 100,
    quantile: float = 0.9,
    tie: float = TIE,
    measure: str | Objective | None = None,
    ablation: Ablation | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> MinimalityTest:
    """Whether each of the circuit's edges matters more than edges that were added at random.

    1. An edge's effect is the root mean square over pairs of s(C) - s(C without it).
    2. A spare effect: add a random path from the input to the logits that is not all in the
       circuit, and remove one random edge of those it added.
    3. An edge matters if its effect exceeds at least the share `quantile` of spare effects; the
       p-value is the chance of so few excesses, binomial in `n_random` draws.

    Args:
        edges: those to test; all of the circuit by default.
        n_random: spare effects; two masked forwards each, one for every edge tested.
        tie: an effect exceeds another if it is larger by more than this.

    Raises ValueError for a circuit with no edges, all or spans, KeyError for edges not in it.
    """
    graph = circuit.graph
    refuse_spans(graph, "minimality_test")
    names = circuit.edges if edges is None else tuple(edges)
    missing = [name for name in names if name not in circuit]
    if missing:
        raise KeyError(f"{missing[0]} is not in the circuit.")
    if not names or circuit.n_edges == graph.n_edges:
        raise ValueError(
            f"a circuit of {circuit.n_edges} of {graph.n_edges} edges ({len(names)} to test): the "
            "minimality test needs edges inside, and others outside to compare them with."
        )
    generator = random.Random(seed)
    inflated = [inflate(circuit, generator) for _ in range(n_random)]
    cut = [cut_edge(circuit.mask, graph.index(name)) for name in names]
    masks = [circuit.mask, *cut, *(mask for mask, _ in inflated)]
    masks += [cut_edge(mask, edge) for mask, edge in inflated]
    of_circuit, *of_masks = _measured(
        model, circuit, masks, task, measure, ablation, batch_size
    ).circuits
    without_edge, larger = of_masks[: len(cut)], of_masks[len(cut) : len(cut) + n_random]
    effects = [_root_mean_square(of_circuit - values) for values in without_edge]
    random_effects = [
        _root_mean_square(with_path - without_edge_of_path)
        for with_path, without_edge_of_path in zip(
            larger, of_masks[len(cut) + n_random :], strict=True
        )
    ]
    p_values = holm([exceedance_test(effect - tie, random_effects, quantile) for effect in effects])
    return MinimalityTest(names, tuple(effects), tuple(p_values), tuple(random_effects), quantile)


# ------------------------------------------------------------------------------- parts


def inflate(circuit: Circuit, generator: random.Random) -> tuple[Bool[Tensor, " edge"], int]:
    """The circuit with a random path from the input to the logits, and one edge that it added.

    Raises ValueError for the circuit of all edges.
    """
    if circuit.n_edges == circuit.graph.n_edges:
        raise ValueError("a circuit of all edges has no other path to add.")
    while True:
        path = random_path(circuit.graph, generator)
        added = [edge for edge in path if not bool(circuit.mask[edge])]
        if added:
            mask = circuit.mask.clone()
            mask[path] = True
            return mask, generator.choice(added)


def random_path(graph: EdgeGraph, generator: random.Random) -> list[int]:
    """Edges of a path from an input to the logits, each drawn from all that leave the node (Shi et
    al.'s walk); a key or value that several heads share leads to one of them.
    """
    leaving: dict[str, list[int]] = {name: [] for name in graph.sources}
    for edge, (source, _) in enumerate(graph.pairs):
        leaving[graph.sources[source]].append(edge)
    node, path = generator.choice(graph.sources[: graph.n_inputs]), []
    while True:
        path.append(generator.choice(leaving[node]))
        destination = graph.destinations[graph.pairs[path[-1]][1]]
        if destination == "logits":
            return path
        node = generator.choice(graph.owner(destination))


def _measured(
    model: Any,
    circuit: Circuit,
    masks: Sequence[Tensor],
    task: Task,
    measure: str | Objective | None,
    ablation: Ablation | None,
    batch_size: int,
) -> PerPair:
    check_origin(model, circuit.graph, circuit.metadata)
    objective = find_measure(measure, task)
    kind = ablation_of(circuit.metadata) if ablation is None else ablation
    return measure_circuits(
        model, circuit.graph, masks, task, objective, ablation=kind, batch_size=batch_size
    )


def _root_mean_square(values: Float[Tensor, " pair"]) -> float:
    return float(values.square().mean().sqrt())
