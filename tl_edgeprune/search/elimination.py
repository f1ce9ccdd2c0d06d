"""Backward elimination: smaller circuits from a ranking's highest edges, the least needed first.

A ranking that was learned for one size says little about much smaller ones: one edge that others
need can lie anywhere in it. So its `start` highest edges are ranked anew, by what their cuts do.

1. The mask's gradient at the circuit guesses each edge's rise: how much the objective would gain if
   the edge went.
2. Of the lowest guesses, `LOOKED_AT` times as many as should go (eight at least) are cut one by
   one, exactly.
3. The least harmful go together, a `share` of the circuit. If the objective then rises by more than
   `TOLERANCE` times what the single cuts add up to (edges that stand in for one another: each can
   go, not both), half as many go; the next round tries twice as many as went.
4. Edges that then carry nothing go with them: those that lead nowhere, and under counterfactual
   ablation those that no difference of the prompts reaches.

The order in which edges go is their new ranking. The definition is the same with every kept edge
cut in step 2 and one a round.
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
from tl_edgeprune.attribution.paths import at
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.metadata import ablation_of
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.reachability import leading_edges
from tl_edgeprune.objectives import Objective, find_objective
from tl_edgeprune.runs.provenance import check_origin, origin
from tl_edgeprune.runs.resume import Saved, saving
from tl_edgeprune.runs.targets import Teacher
from tl_edgeprune.runs.task_checks import check_tokens
from tl_edgeprune.search.cuts import find_cuts
from tl_edgeprune.search.full_cuts import WholeCuts
from tl_edgeprune.search.grouped import GRADIENT_RUNS
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.utils.reading import of_kind

LOOKED_AT, AT_LEAST = 3, 8
TOLERANCE = 1.5
NOISE = 1e-3  # units of the objective that a group may rise by beyond that


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
    """The scores' `start` highest edges ranked anew, down to `stop`, by backward elimination:
    `top(k)` of the result is a better circuit for k from `stop` to `start`.

    Args:
        task: pairs to cut on, all of which are looked at: 24 to 64 do.
        start: about twice the size that is wanted; where the ranking is good by itself.
        stop: the smallest size that is wanted.
        share: how much of the circuit may go in a round.
        objective: what should rise the least; the task's own by default. It needs a gradient.
        ablation: what removed edges carry; by default what the scores were found with.
        checkpoint: a file to save to every half minute; if it is there, the run goes on.

    A round costs a forward and a backward over all pairs, and a partial forward for each cut, about
    three for each edge that goes. Edges outside the `start` highest keep their order, below; the
    last `stop` keep theirs, above. Metadata gain "eliminated": start, stop, pairs, and the
    objective before and after.

    Raises ValueError unless 1 <= stop < start < the graph's edges and 0 < share <= 1, as `evaluate`
    does for another model's scores, and for a checkpoint of another run.
    """
    _check(scores, start, stop, share)
    loss_of = find_objective(objective, task)
    check_tokens(task, model)
    check_origin(model, scores.graph, scores.metadata, "ranking")
    kind = ablation_of(scores.metadata) if ablation is None else ablation
    about = origin(model, task, method="elimination", objective=objective, ablation=kind)
    settings: dict[str, Any] = {
        "objective": objective,
        "ablation": kind,
        "share": share,
        "stop": stop,
    }
    settings |= {"highest": scores.top(start).mask.nonzero().flatten().tolist()}
    with (
        MaskedModel.attach(model, scores.graph) as run,
        saving(checkpoint, about, settings, run, task) as saved,
    ):
        teacher = Teacher(run, task, kind, batch_size=batch_size)
        cuts = find_cuts(run, teacher, loss_of, batch_size=batch_size)
        first = scores.top(start).mask
        cuts.set(first)
        before = cuts.value
        elimination = _Elimination(cuts, teacher, stop, share, batch_size, saved)
        elimination.run(progress)
        note: dict[str, Any] = {"start": start, "stop": stop, "pairs": len(task)}
        note |= {"before": before, "after": cuts.value}
    ranks = _ranks(scores.ranking(), first, elimination.gone)
    metadata = scores.metadata | {"eliminated": note, "ablation": str(kind)}
    return EdgeScores(scores.graph, ranks, metadata, by_magnitude=False)


@dataclass
class _Elimination:
    """Rounds of cuts. gone: the edges that went, in that order. reach: how many may go next."""

    cuts: WholeCuts
    teacher: Teacher
    stop: int
    share: float
    batch_size: int
    saved: Saved
    gone: list[int] = field(default_factory=list)
    reach: int = 0

    def run(self, progress: bool) -> None:
        """From the current mask, or from where a run was stopped, down to `stop`."""
        size = int(self.cuts.mask.sum())
        self.gone, self.reach = _before(self.saved, self.cuts.mask) or ([], size)
        if self.gone:
            self.cuts.set(without(self.cuts.mask, self.gone))
        self._drop_dead()
        with tqdm(total=size - self.stop, unit="edge", disable=not progress) as bar:
            bar.set_description("eliminating")
            while (left := int(self.cuts.mask.sum())) > self.stop:
                bar.set_postfix(objective=f"{self.cuts.value:.4g}", edges=left)
                bar.update(size - left - bar.n)
                most = min(left - self.stop, self.reach, max(1, int(self.share * left)))
                self.reach = 2 * self._round(most)
                self._drop_dead()
                gone = torch.tensor(self.gone, dtype=torch.long)
                self.saved.save({"gone": gone}, {"reach": self.reach})

    def _round(self, most: int) -> int:
        """Let `most` edges go, or fewer where they stand in for one another; how many went."""
        mask, value = self.cuts.mask.clone(), self.cuts.value
        edges, rises = self._least_harmful(max(AT_LEAST, LOOKED_AT * most))
        while True:
            going = edges[:most].tolist()
            self.cuts.set(without(mask, going))
            expected = float(rises[:most].clamp(min=0).sum())
            if most == 1 or self.cuts.value - value <= TOLERANCE * expected + NOISE:
                self.gone += going
                return most
            most = (most + 1) // 2

    def _least_harmful(self, count: int) -> tuple[Int[Tensor, " edge"], Float[Tensor, " edge"]]:
        """So many edges of the lowest guesses, and their rises, the smallest first."""
        cuts = self.cuts
        cuts.runs += GRADIENT_RUNS
        path = at(cuts.mask)
        guess = path_scores(cuts.run, self.teacher, path, cuts.loss_of, batch_size=self.batch_size)
        guess[~cuts.mask] = torch.inf
        lowest = guess.topk(min(count, int(cuts.mask.sum())), largest=False).indices
        edges = lowest.sort().values
        rises = single_cuts(cuts, edges)
        order = rises.argsort(stable=True)
        return edges[order], rises[order]

    def _drop_dead(self) -> None:
        """Edges that carry nothing to the logits go without a run.

        A source that nothing reaches writes what it does on corrupted prompts, but neither zero nor
        a mean.
        """
        if self.cuts.heads_interact:
            return
        graph, kept = self.cuts.graph, self.cuts.mask
        alive = leading_edges(graph, kept)
        if self.teacher.ablation == "counterfactual":
            alive = Circuit(graph, kept).without_dead_edges().mask
        dead = (kept & ~alive).nonzero().flatten()
        self.gone += dead.tolist()
        self.cuts.drop(dead)


def single_cuts(cuts: WholeCuts, edges: Int[Tensor, " tried"]) -> Float[Tensor, " tried"]:
    """How much the objective rises if each of these edges (in flat order) goes by itself."""
    rises: list[float] = []
    for place, read in enumerate(cuts.graph.reads):
        own = edges[(edges >= read.edges.start) & (edges < read.edges.stop)] - read.first_edge
        for some in own.split(cuts.candidates(place)) if len(own) else ():
            cut = torch.zeros(len(some), read.n_destinations * read.n_sources, dtype=torch.bool)
            cut[torch.arange(len(some)), some] = True
            shape = (len(some), read.n_destinations, read.n_sources)
            rises += cuts.values(place, cut.view(shape))
    return torch.tensor(rises, dtype=torch.float64) - cuts.value


def without(mask: Bool[Tensor, " edge"], edges: list[int]) -> Bool[Tensor, " edge"]:
    """The mask less these edges."""
    left = mask.clone()
    left[edges] = False
    return left


def _ranks(
    ranking: Float[Tensor, " edge"], first: Bool[Tensor, " edge"], gone: list[int]
) -> Float[Tensor, " edge"]:
    """Each edge's place, from 0: those outside `first`, those that went, those that are left."""
    order = ranking.argsort(stable=True)
    left = without(first, gone)
    went = torch.tensor(gone, dtype=torch.long)
    whole = torch.cat([order[~first[order]], went, order[left[order]]])
    ranks = torch.empty_like(ranking, dtype=torch.float32)
    ranks[whole] = torch.arange(len(whole), dtype=torch.float32)
    return ranks


def _before(saved: Saved, first: Bool[Tensor, " edge"]) -> tuple[list[int], int] | None:
    """What went before a run was stopped, and how many might go next."""
    state = saved.load()
    if state is None:
        return None
    with saved.damaged():
        gone, reach = state[0]["gone"], of_kind(state[1]["reach"], int, "reach")
        known = gone.dtype == torch.long and gone.ndim == 1 and len(gone.unique()) == len(gone)
        if not known or not bool(first[gone].all()) or reach < 1:
            raise ValueError("it holds edges that this run does not start from")
    return gone.tolist(), reach


def _check(scores: EdgeScores, start: int, stop: int, share: float) -> None:
    most = scores.graph.n_edges
    if not 1 <= stop < start < most:
        raise ValueError(
            f"start={start}, stop={stop}: expected sizes of circuits, stop below start, from 1 to "
            f"{most - 1} (the graph has {most} edges)."
        )
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a share of the circuit, above 0 to 1.")
