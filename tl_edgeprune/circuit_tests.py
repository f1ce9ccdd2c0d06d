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

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.metadata import ablation_of
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.spans import refuse_spans
from tl_edgeprune.knockouts import cut_edge
from tl_edgeprune.measures import find_measure
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.circuit_runs import Measured, measure_circuits
from tl_edgeprune.runs.provenance import check_origin
from tl_edgeprune.tasks.task import Task

TIE = 1e-4
"""Scores that are no further apart are equal: masked runs in float32 differ by as much."""


@dataclass(frozen=True, repr=False)
class EquivalenceTest:
    """p_value of the hypothesis that neither is better on more than 1/2 + epsilon of the pairs.

    share_better: of pairs on which the circuit scores higher than the model, ties counting half.
    """

    p_value: float
    share_better: float
    epsilon: float
    n_pairs: int

    def __repr__(self) -> str:
        return (
            f"EquivalenceTest(p = {self.p_value:.3g}, circuit better on {self.share_better:.1%} of "
            f"{self.n_pairs} pairs, epsilon {self.epsilon:g})"
        )


@dataclass(frozen=True, repr=False)
class IndependenceTest:
    """p_value of the hypothesis that the complement's scores are independent of the model's.

    hsic: the Hilbert-Schmidt independence criterion of the two, 0 for constant scores.
    """

    p_value: float
    hsic: float
    n_pairs: int

    def __repr__(self) -> str:
        return (
            f"IndependenceTest(p = {self.p_value:.3g}, HSIC {self.hsic:.3g} on {self.n_pairs} "
            "pairs)"
        )


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
    rest = ~circuit.mask
    measured = _measured(model, circuit, [rest], task, measure, ablation, batch_size)
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
    whole, *rest = _measured(model, circuit, masks, task, measure, ablation, batch_size).circuits
    own, larger = rest[: len(cut)], rest[len(cut) : len(cut) + n_random]
    effects = [_root_mean_square(whole - values) for values in own]
    spare = [
        _root_mean_square(before - after)
        for before, after in zip(larger, rest[len(cut) + n_random :], strict=True)
    ]
    p_values = holm([exceedance_test(effect - tie, spare, quantile) for effect in effects])
    return MinimalityTest(names, tuple(effects), tuple(p_values), tuple(spare), quantile)


# ------------------------------------------------------------------------------- on numbers


def sign_test(
    differences: Float[Tensor, " pair"], *, epsilon: float = 0.1, tie: float = 0.0
) -> EquivalenceTest:
    """Whether the share of positive differences is within epsilon of 1/2.

    Shi et al.'s equivalence test. The statistic is its distance from 1/2; the p-value is the chance
    of one at least as large if the share were 1/2 + epsilon, the worst case that the hypothesis
    allows. Ours: a tie (at most `tie` apart) is half a pair on each side, so a circuit that equals
    the model always passes.
    """
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon={epsilon}: expected a number from 0 to below 0.5.")
    _check_finite(differences)
    n = len(differences)
    better = int((differences > tie).sum()) + int((differences.abs() <= tie).sum()) / 2
    distance = abs(better - n / 2)
    counts = torch.arange(n + 1, dtype=torch.double)
    far = (counts - n / 2).abs() >= distance
    p_value = float(binomial(n, 0.5 + epsilon)[far].sum())
    return EquivalenceTest(min(1.0, p_value), better / n, epsilon, n)


def hsic_test(
    x: Float[Tensor, " pair"],
    y: Float[Tensor, " pair"],
    *,
    permutations: int = 1000,
    tie: float = 0.0,
    seed: int = 0,
) -> IndependenceTest:
    """Whether two scores are independent: HSIC against its values under permutations.

    HSIC = trace(K H L H) / n² with Gaussian kernels and H the centring matrix (Gretton et al. 2007,
    "A kernel statistical test of independence"). The p-value is the share of permutations with as
    large a value. Ours: the data itself is among them, and each kernel has the width of its own
    score's median distance, so that the test sees neither scores' scale nor mean. A score that
    spreads over no more than `tie` is constant, and so independent of anything.
    """
    _check_finite(x, y)
    n = len(x)
    if min(_spread(x), _spread(y)) <= tie:
        return IndependenceTest(1.0, 0.0, n)
    kernel_x, kernel_y = _centred(_gaussian(x)), _gaussian(y)
    found = (kernel_x * kernel_y).sum()
    generator = torch.Generator().manual_seed(seed)
    as_large = 1
    for _ in range(permutations):
        order = torch.randperm(n, generator=generator)
        as_large += int((kernel_x * kernel_y[order][:, order]).sum() >= found * (1 - 1e-12))
    return IndependenceTest(as_large / (permutations + 1), float(found) / n**2, n)


def exceedance_test(effect: float, others: Sequence[float], quantile: float) -> float:
    """p-value of: an effect exceeds others with probability at least `quantile` (binomial, one
    side: few excesses speak against it).
    """
    exceeded = sum(effect > other for other in others)
    return min(1.0, float(binomial(len(others), quantile)[: exceeded + 1].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the k-th smallest of n times n + 1 - k."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def binomial(n: int, share: float) -> Float[Tensor, " count"]:
    """Probabilities of 0 to n successes of n."""
    k = torch.arange(n + 1, dtype=torch.double)
    total = torch.tensor(float(n), dtype=torch.double)
    ways = torch.lgamma(total + 1) - torch.lgamma(k + 1) - torch.lgamma(total - k + 1)
    return (ways + torch.xlogy(k, share) + torch.xlogy(total - k, 1 - share)).exp()


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
) -> Measured:
    check_origin(model, circuit.graph, circuit.metadata)
    objective = find_measure(measure, task)
    kind = ablation_of(circuit.metadata) if ablation is None else ablation
    return measure_circuits(
        model, circuit.graph, masks, task, objective, ablation=kind, batch_size=batch_size
    )


def _check_finite(*scores: Float[Tensor, " pair"]) -> None:
    for score in scores:
        if not bool(torch.isfinite(score).all()):
            raise ValueError("a score is NaN or infinite on some pair: nothing can be told of it.")


def _root_mean_square(values: Float[Tensor, " pair"]) -> float:
    return float(values.square().mean().sqrt())


def _spread(values: Float[Tensor, " pair"]) -> float:
    return float(values.max() - values.min())


def _gaussian(x: Float[Tensor, " pair"]) -> Float[Tensor, "pair pair"]:
    squares = (x[:, None] - x[None, :]).double().square()
    off_diagonal = squares[~torch.eye(len(x), dtype=torch.bool)]
    width = off_diagonal.median()
    width = width if width > 0 else off_diagonal.mean()  # most pairs alike
    return (-squares / (2 * width)).exp()


def _centred(kernel: Float[Tensor, "pair pair"]) -> Float[Tensor, "pair pair"]:
    return kernel - kernel.mean(0, keepdim=True) - kernel.mean(1, keepdim=True) + kernel.mean()
