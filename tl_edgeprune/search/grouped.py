"""ACDC by groups: remove many edges in one run, and look closer only where that hurts.

1. The mask's gradient, averaged over z (mask-IG, `ORDER_STEPS` points), guesses each edge's rise.
2. Reads are visited as in ACDC, from the logits back. Within a read, edges come in the order of
   that guess, the least harmful first.
3. First all of a read's edges are removed at once; that stays if the objective rises by less than
   the threshold. If not, the next edges whose guesses add up to `reach` (one at least) are tried
   together, and so on; reach follows what guesses come to, so that a group should cost `AIM`
   thresholds. An edge that costs a threshold by itself is kept, as in ACDC.
4. The mask's gradient at what is left tells which removed edges would lower the objective by the
   threshold if they came back; the best of them do, up to a quarter as many as are left. What
   looked dispensable before its companions went is not.
5. Kept edges are tried by themselves (`single_edges.py`), until trying all of them removes none. So
   each edge of the circuit raises the objective by at least the threshold when cut.

A group goes only where all of it costs less than one edge may. Runs are a few for each edge kept,
and few for those removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.attribution.mask_gradient import path_scores
from tl_edgeprune.attribution.paths import Path, at, mask_path
from tl_edgeprune.runs.targets import Teacher
from tl_edgeprune.search.full_cuts import WholeCuts
from tl_edgeprune.search.sequential import to_decide
from tl_edgeprune.search.single_edges import Singles, try_each

ORDER_STEPS = 5
GRADIENT_RUNS = 3  # what a forward and a backward under masks count as
GROWTH = 4
AIM = 0.7
RESTORED = 0.25


@dataclass(frozen=True)
class Stage:
    """Where a run by groups is. reach: of the next group, None at first. singles: where trying kept
    edges by themselves is, once groups are done.
    """

    reach: float | None = None
    singles: Singles | None = None


Report = Callable[[int, Stage], None]
"""Told that the edges from one on are decided, and the stage there."""


def in_groups(
    cuts: WholeCuts,
    teacher: Teacher,
    threshold: float,
    start: int,
    stage: Stage,
    report: Report,
    *,
    batch_size: int = 8,
) -> None:
    """Remove what can go of the edges before `start`, put back what is missed, and try every kept
    edge by itself. `start` and `stage` are where a run begins: with any that was reported (and the
    mask then), it goes on as if it had never stopped.
    """
    guess = _gradient(cuts, teacher, mask_path(ORDER_STEPS), ORDER_STEPS, batch_size).clamp(min=0)
    singles = stage.singles
    if singles is None:
        groups = _Groups(cuts, guess, threshold, stage.reach)
        for place in reversed(range(len(cuts.graph.reads))):
            edges = [edge for edge in to_decide(cuts, place) if edge < start]
            groups.remove(place, sorted(edges, key=lambda edge: float(guess[edge])))
            report(min(start, cuts.graph.reads[place].first_edge), Stage(groups.reach))
        _restore(cuts, teacher, threshold, batch_size)
        singles = Singles.first(cuts)
        report(0, Stage(singles=singles))
    try_each(cuts, threshold, guess, singles, lambda: report(0, Stage(singles=singles)))


class _Groups:
    """Groups of edges to remove: how far to reach is learned from group to group."""

    def __init__(
        self,
        cuts: WholeCuts,
        guess: Float[Tensor, " edge"],
        threshold: float,
        reach: float | None,
    ) -> None:
        self.cuts, self.threshold = cuts, threshold
        self.guess: list[float] = guess.tolist()
        self.reach = threshold if reach is None else reach

    def remove(self, place: int, edges: Sequence[int]) -> None:
        """Remove what can go of these edges of a read, in this order: all, or group by group."""
        if len(edges) > 1 and self._goes(place, edges)[0]:
            return
        done, most = 0, len(edges) // 2 or 1
        while done < len(edges):
            group, sum_of_guesses = self._next(edges[done : done + most])
            goes, rise = self._goes(place, group)
            if goes or len(group) == 1:
                done += len(group)
            most = GROWTH * len(group) if goes else max(1, len(group) // 2)
            if goes or len(group) > 1:
                self._learn(sum_of_guesses, rise)

    def _goes(self, place: int, group: Sequence[int]) -> tuple[bool, float]:
        """Remove a group if together it costs less than the threshold; its rise."""
        (value,) = self.cuts.values(place, _cut(self.cuts, place, group))
        rise = value - self.cuts.value
        if rise < self.threshold:
            self.cuts.commit(0)
        return rise < self.threshold, rise

    def _learn(self, sum_of_guesses: float, rise: float) -> None:
        """Reach as far as `AIM` thresholds should lie, by what this group's guesses came to."""
        if rise > 0:
            aim = sum_of_guesses * AIM * self.threshold / rise
            self.reach = min(aim, max(self.reach, GROWTH * sum_of_guesses))
        else:
            self.reach = max(self.reach, GROWTH * sum_of_guesses)

    def _next(self, edges: Sequence[int]) -> tuple[Sequence[int], float]:
        """As many of the first edges as lie within reach, at least one; what they add up to."""
        total, count = 0.0, 0
        for edge in edges:
            if count and total + self.guess[edge] > self.reach:
                break
            total, count = total + self.guess[edge], count + 1
        return edges[:count], total


def _gradient(
    cuts: WholeCuts, teacher: Teacher, path: Path, points: int, batch_size: int
) -> Float[Tensor, " edge"]:
    """A guess of each edge's rise."""
    cuts.runs += GRADIENT_RUNS * points
    return path_scores(cuts.run, teacher, path, cuts.loss_of, batch_size=batch_size)


def _restore(cuts: WholeCuts, teacher: Teacher, threshold: float, batch_size: int) -> None:
    """Put back the removed edges of the highest guess, if that lowers the objective."""
    if not cuts.mask.any() or bool(cuts.mask.all()):
        return
    guess = _gradient(cuts, teacher, at(cuts.mask), 1, batch_size)
    guess[cuts.mask] = -torch.inf
    best = guess.topk(math.ceil(RESTORED * int(cuts.mask.sum())))
    missed = best.indices[best.values >= threshold]
    if not len(missed):
        return
    before, value = cuts.mask.clone(), cuts.value
    wider = before.clone()
    wider[missed] = True
    cuts.set(wider)
    if not cuts.value < value:
        cuts.set(before)


def _cut(cuts: WholeCuts, place: int, edges: Sequence[int]) -> Tensor:
    """One candidate that cuts these edges, [1, destination, source]."""
    read = cuts.graph.reads[place]
    cut = torch.zeros(read.n_destinations * read.n_sources, dtype=torch.bool)
    cut[torch.tensor(edges) - read.first_edge] = True
    return cut.view(1, read.n_destinations, read.n_sources)
