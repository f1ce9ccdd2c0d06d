"""Faithfulness over circuit sizes, and the MIB benchmark's two areas under it: CPR and CMD.

f(C) = (m(C) - m(empty)) / (m(full) - m(empty)), with m the mean of a measure over the task's pairs.
Circuits are the top edges of one ranking at several shares of the graph, dead edges taken away.

- CPR, the circuit performance ratio: the area under f, for circuits of signed top scores.
- CMD, the circuit-model distance: the area under |1 - f|, for those of top magnitudes.

Both areas are sums of trapezoids on a linear axis over the shares; nothing is added below the
first share, and they are not normalised. Mueller et al. 2025, "MIB: A Mechanistic Interpretability
Benchmark", section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.metadata import ablation_of
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.graph.edge_counts import edge_counts, longest_run
from tl_edgeprune.objectives import Objective, find_measure
from tl_edgeprune.runs.circuit_runs import measure_circuits
from tl_edgeprune.runs.provenance import check_origin
from tl_edgeprune.tasks.task import Task

MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class FaithfulnessCurve:
    """f of a ranking's circuits at rising shares of the graph.

    n_edges: of each circuit without its dead edges, in the convention's count. full, empty: the
    mean measure of the full model and of no edges.
    """

    shares: tuple[float, ...]
    n_edges: tuple[int, ...]
    faithfulness: tuple[float, ...]
    full: float
    empty: float

    @property
    def cpr(self) -> float:
        """Area under f. It is MIB's CPR where the circuits are of signed top scores."""
        return area(self.shares, self.faithfulness)

    @property
    def cmd(self) -> float:
        """Area under |1 - f|. It is MIB's CMD where the circuits are of top magnitudes."""
        return area(self.shares, [abs(1 - f) for f in self.faithfulness])


class MibFaithfulness(NamedTuple):
    """MIB's two figures of one ranking, and the curves that they are areas of."""

    cpr: float
    cmd: float
    signed: FaithfulnessCurve
    absolute: FaithfulnessCurve


def area(shares: Sequence[float], values: Sequence[float]) -> float:
    """Trapezoids between neighbouring shares, on a linear axis."""
    points = zip(shares, values, strict=True)
    trapezoids = ((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in itertools.pairwise(points))
    return sum(trapezoids, 0.0)


def faithfulness_curve(
    model: Any,
    scores: EdgeScores,
    task: Task,
    *,
    shares: Sequence[float] = MIB_SHARES,
    absolute: bool | None = None,
    measure: str | Objective | None = None,
    convention: str = "graph",
    ablation: Ablation | None = None,
    batch_size: int = 16,
) -> FaithfulnessCurve:
    """Faithfulness of the top edges of a ranking, at each share of the graph's edges.

    Args:
        shares: rising, above 0 and at most 1; a circuit has int(share * n_edges) edges.
        absolute: rank by magnitude, or by signed score; None for what fits the scores, as in
            `EdgeScores.top`.
        measure: an objective whose negative is measured; by default the logit difference where the
            task has one, else the probability difference, else the task's own objective.
        convention: "graph" counts this graph's edges. "mib" counts an edge into a key or value
            that several query heads share once for each of them, as MIB does (and one into a head
            of a graph with split_qkv=False three times), and takes the longest run of top edges
            whose count fits.
        ablation: the scores' own by default.

    Raises ValueError for shares that do not rise within (0, 1], scores of another graph, and a
    measure that is the same with all edges and with none. One masked forward a share and batch.
    """
    check_shares(shares)
    check_origin(model, scores.graph, scores.metadata, "ranking")
    objective = find_measure(measure, task)
    counts = edge_counts(scores.graph, convention)
    ranked = scores.ranking(absolute)
    circuits = [
        Circuit(scores.graph, mask).without_dead_edges()
        for mask in top_masks(ranked, counts, shares)
    ]
    nothing = torch.zeros(scores.graph.n_edges, dtype=torch.bool)
    measured = measure_circuits(
        model,
        scores.graph,
        [nothing, *(circuit.mask for circuit in circuits)],
        task,
        objective,
        ablation=ablation_of(scores.metadata) if ablation is None else ablation,
        batch_size=batch_size,
    )
    full, (empty, *means) = float(measured.full.mean()), measured.circuits.mean(1).tolist()
    if full == empty:
        raise ValueError(
            f"the measure is {full:.4g} with all edges and with none, so faithfulness has no "
            "scale: choose another measure=…, or pairs whose two prompts have different answers."
        )
    return FaithfulnessCurve(
        tuple(shares),
        tuple(int(counts[circuit.mask].sum()) for circuit in circuits),
        tuple((mean - empty) / (full - empty) for mean in means),
        full,
        empty,
    )


def mib_faithfulness(
    model: Any, scores: EdgeScores, task: Task, *, convention: str = "mib", **settings: Any
) -> MibFaithfulness:
    """CPR and CMD as MIB defines them: two curves, of signed top scores and of top magnitudes.

    Scores that are ranked as they are (log alphas) have one curve: a large negative one is the
    first to go.
    """
    signed, *by_magnitude = (
        faithfulness_curve(
            model, scores, task, absolute=absolute, convention=convention, **settings
        )
        for absolute in ((False, True) if scores.by_magnitude else (False,))
    )
    absolute = by_magnitude[0] if by_magnitude else signed
    return MibFaithfulness(signed.cpr, absolute.cmd, signed, absolute)


def top_masks(
    ranked: Tensor, counts: Int[Tensor, " edge"], shares: Sequence[float]
) -> list[Bool[Tensor, " edge"]]:
    """For each share, the longest run of top edges that counts at most int(share * all edges).

    Of equal scores, those first in the graph come first.
    """
    n_edges = int(counts.sum())
    return [longest_run(ranked, counts, int(share * n_edges)) for share in shares]


def check_shares(shares: Sequence[float]) -> None:
    """Raise ValueError unless the shares rise, above 0 and to at most 1."""
    rising = all(first < second for first, second in itertools.pairwise(shares))
    if not shares or not rising or not 0 < shares[0] <= shares[-1] <= 1:
        raise ValueError(f"shares={tuple(shares)}: expected rising numbers above 0 and at most 1.")
