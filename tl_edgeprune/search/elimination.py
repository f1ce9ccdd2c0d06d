"""Backward elimination: smaller circuits from a ranking's highest edges, the least needed first.

A ranking that was learned for one size says little about much smaller ones: an edge that others
need can have any rank. So its `start` highest edges are ranked again, by the effects of their cuts.

1. The mask's gradient at the circuit guesses the effect of each edge: how much the objective rises
   if the edge is cut.
2. The edges of the lowest guesses are cut one by one, exactly: `CUTS_PER_EDGE` times as many as are
   to be removed, and eight at least.
3. The least harmful are removed together, a `share` of the circuit. If the objective then rises by
   more than `TOLERANCE` times the sum of the single effects (edges that stand in for one another:
   each can be removed, but not both), half as many are removed; the next round tries twice as many
   as were.
4. Edges that then carry nothing are removed with them: those that do not lead to the logits, and
   under counterfactual ablation those that no difference of the prompts reaches.

The order of removal is the new ranking. By definition, step 2 would cut every kept edge, and a
round would remove one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.attribution.mask_gradient import path_scores
from tl_edgeprune.attribution.paths import path_at
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.metadata import ablation_of
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.graph.reachability import leading_edges
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.resume import Saved
from tl_edgeprune.runs.session import open_session
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.search.cuts import find_cuts
from tl_edgeprune.search.edge_effects import edge_effects
from tl_edgeprune.search.full_cuts import FullCuts
from tl_edgeprune.search.grouped import GRADIENT_RUNS
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.utils.reading import check_type

CUTS_PER_EDGE, MIN_CUT = 3, 8
TOLERANCE = 1.5
NOISE = 1e-3  # units of the objective: what a group may add beyond that


def eliminate(
    model: Any,
    task: Task,
    scores: EdgeScores,
    *,
    start: int,
    stop: int,
    share: float = 0.06,
    objective: str | Objective | None = None,
    ablation: Ablation | None = None,
    batch_size: int = 8,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EdgeScores:
    """The scores' `start` highest edges ranked again, down to `stop`, by backward elimination:
    `top(k)` of the result is a better circuit for k from `stop` to `start`.

    Args:
        task: pairs to cut on, all of which are used: 24 to 64 are enough.
        start: about twice the size of the circuit that you need; the ranking must be good there.
        stop: the smallest size that you need.
        share: the share of the circuit that one round may remove.
        objective: what should rise the least; the task's own by default. It needs a gradient.
        ablation: what removed edges carry; by default what the scores were found with.
        checkpoint: a file that the state is saved to every half minute; if it exists, the run
            continues from it.

    A round costs a forward and a backward over all pairs, and a partial forward for each cut, about
    three per removed edge. Edges outside the `start` highest keep their order, below; the last
    `stop` keep theirs, above. Metadata gain "eliminated": start, stop, pairs, and the objective
    before and after.

    Raises ValueError unless 1 <= stop < start < the graph's edges and 0 < share <= 1, as `evaluate`
    does for another model's scores, and for the checkpoint of another run.
    """
    _check(scores, start, stop, share)
    if ablation is None:
        ablation = ablation_of(scores.metadata)
    highest = scores.top(start).mask
    with open_session(
        model,
        task,
        result=scores,
        objective=objective,
        ablation=ablation,
        batch_size=batch_size,
        metadata={"method": "elimination"},
        settings={
            "objective": objective,
            "ablation": ablation,
            "share": share,
            "stop": stop,
            "highest": highest.nonzero().flatten().tolist(),
        },
        checkpoint=checkpoint,
    ) as session:
        cuts = find_cuts(session.run, session.targets, session.loss_of, batch_size=batch_size)
        cuts.set(highest)
        at_start = cuts.value
        elimination = _Elimination(cuts, session.targets, stop, share, batch_size, session.saved)
        elimination.run(progress)
    note: dict[str, float] = {"start": start, "stop": stop, "pairs": len(task)}
    note |= {"before": at_start, "after": cuts.value}
    ranks = _ranks(scores.ranking(), highest, elimination.removed)
    metadata = scores.metadata | {"eliminated": note, "ablation": str(ablation)}
    return EdgeScores(scores.graph, ranks, metadata, by_magnitude=False)


@dataclass
class _Elimination:
    """Rounds of cuts. removed: the removed edges, in their order. reach: the most edges that may be
    removed in the next round.
    """

    cuts: FullCuts
    targets: Targets
    stop: int
    share: float
    batch_size: int
    saved: Saved
    removed: list[int] = field(default_factory=list)
    reach: int = 0

    def run(self, progress: bool) -> None:
        """From the current mask, or from the saved state of a stopped run, down to `stop`."""
        size = int(self.cuts.mask.sum())
        self.removed, self.reach = _saved_rounds(self.saved, self.cuts.mask) or ([], size)
        if self.removed:
            self.cuts.set(mask_without(self.cuts.mask, self.removed))
        self._drop_dead()
        with tqdm(total=size - self.stop, unit="edge", disable=not progress) as bar:
            bar.set_description("eliminating")
            while (n_kept := int(self.cuts.mask.sum())) > self.stop:
                bar.set_postfix(objective=f"{self.cuts.value:.4g}", edges=n_kept)
                bar.update(size - n_kept - bar.n)
                count = min(n_kept - self.stop, self.reach, max(1, int(self.share * n_kept)))
                self.reach = 2 * self._round(count)
                self._drop_dead()
                removed = torch.tensor(self.removed, dtype=torch.long)
                self.saved.save({"gone": removed}, {"reach": self.reach})

    def _round(self, count: int) -> int:
        """Remove `count` edges, or fewer if they stand in for one another; how many were."""
        mask, value = self.cuts.mask.clone(), self.cuts.value
        edges, effects = self._least_harmful(max(MIN_CUT, CUTS_PER_EDGE * count))
        while True:
            removed = edges[:count].tolist()
            self.cuts.set(mask_without(mask, removed))
            expected = float(effects[:count].clamp(min=0).sum())
            if count == 1 or self.cuts.value - value <= TOLERANCE * expected + NOISE:
                self.removed += removed
                return count
            count = (count + 1) // 2

    def _least_harmful(self, count: int) -> tuple[Int[Tensor, " edge"], Float[Tensor, " edge"]]:
        """The `count` edges of the lowest guesses, and the effects of their cuts, in rising order
        of effect.
        """
        cuts = self.cuts
        cuts.runs += GRADIENT_RUNS
        path = path_at(cuts.mask)
        guess = path_scores(cuts.run, self.targets, path, cuts.loss_of, batch_size=self.batch_size)
        guess[~cuts.mask] = torch.inf
        lowest = guess.topk(min(count, int(cuts.mask.sum())), largest=False).indices
        edges = lowest.sort().values
        effects = edge_effects(cuts, edges)
        order = effects.argsort(stable=True)
        return edges[order], effects[order]

    def _drop_dead(self) -> None:
        """Remove the edges that carry nothing to the logits; no run is needed.

        A source that no kept edge reaches writes what it writes on corrupted prompts, which differs
        from zero and from a mean: its edges are dead only under counterfactual ablation.
        """
        if self.cuts.heads_interact:
            return
        graph, kept = self.cuts.graph, self.cuts.mask
        alive = leading_edges(graph, kept)
        if self.targets.ablation == "counterfactual":
            alive = Circuit(graph, kept).without_dead_edges().mask
        dead = (kept & ~alive).nonzero().flatten()
        self.removed += dead.tolist()
        self.cuts.drop(dead)


def mask_without(mask: Bool[Tensor, " edge"], edges: list[int]) -> Bool[Tensor, " edge"]:
    """The mask minus these edges."""
    smaller = mask.clone()
    smaller[edges] = False
    return smaller


def _ranks(
    ranking: Float[Tensor, " edge"], highest: Bool[Tensor, " edge"], removed: list[int]
) -> Float[Tensor, " edge"]:
    """The rank of each edge, from 0: those outside `highest`, then those that were removed, then
    those that are left.
    """
    order = ranking.argsort(stable=True)
    kept = mask_without(highest, removed)
    in_removal_order = torch.tensor(removed, dtype=torch.long)
    new_order = torch.cat([order[~highest[order]], in_removal_order, order[kept[order]]])
    ranks = torch.empty_like(ranking, dtype=torch.float32)
    ranks[new_order] = torch.arange(len(new_order), dtype=torch.float32)
    return ranks


def _saved_rounds(saved: Saved, highest: Bool[Tensor, " edge"]) -> tuple[list[int], int] | None:
    """The edges that a stopped run has removed, and how many the next round may remove."""
    state = saved.load()
    if state is None:
        return None
    with saved.damaged():
        edges, reach = state[0]["gone"], check_type(state[1]["reach"], int, "reach")
        distinct = edges.dtype == torch.long and edges.ndim == 1
        distinct = distinct and len(edges.unique()) == len(edges)
        if not distinct or not bool(highest[edges].all()) or reach < 1:
            raise ValueError("it holds edges that this run does not start from")
    return edges.tolist(), reach


def _check(scores: EdgeScores, start: int, stop: int, share: float) -> None:
    n_edges = scores.graph.n_edges
    if not 1 <= stop < start < n_edges:
        raise ValueError(
            f"start={start}, stop={stop}: expected sizes of circuits, stop below start, from 1 to "
            f"{n_edges - 1} (the graph has {n_edges} edges)."
        )
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a share of the circuit, above 0 to 1.")
