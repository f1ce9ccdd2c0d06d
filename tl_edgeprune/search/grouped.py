"""ACDC by groups: remove many edges in one run, and try smaller groups only if that hurts.

1. The mask's gradient, averaged over z (mask-IG, `ORDER_STEPS` points), predicts how much cutting
   each edge raises the objective.
2. Reads are visited as in ACDC, from the logits back. Within a read, edges are in the order of that
   prediction, the least harmful first.
3. First all of a read's edges are removed at once; they stay removed if the objective rises by less
   than the threshold. If not, the next edges whose predictions add up to `reach` (at least one) are
   tried together, and so on. Reach is adapted to the measured rises, so that a group should cost
   `AIM` thresholds. An edge that costs a threshold by itself is kept, as in ACDC.
4. The mask's gradient at the remaining edges predicts which removed edges would lower the objective
   by the threshold if they came back. The best of them do, up to a quarter of the number of
   remaining edges: an edge may matter only once others are removed.
5. Kept edges are tried by themselves (`single_edges.py`), until trying all of them removes none. So
   each edge of the circuit raises the objective by at least the threshold when cut.

A group is removed only if all of it costs less than one edge may. A search takes a few runs for
each edge kept, and far fewer than one for each edge removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.attribution.mask_gradient import path_scores
from tl_edgeprune.attribution.paths import Path, mask_path, path_at
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.search.full_cuts import FullCuts
from tl_edgeprune.search.sequential import to_decide
from tl_edgeprune.search.single_edges import SingleEdges, try_each

ORDER_STEPS = 5
GRADIENT_RUNS = 3  # a forward and a backward pass under masks count as this many runs
GROWTH = 4
AIM = 0.7
RESTORED = 0.25


@dataclass(frozen=True)
class Stage:
    """How far a search by groups is.

    Attributes:
        reach: that of the next group; None at first.
        singles: how far step 5 is, once the groups are finished.
    """

    reach: float | None = None
    singles: SingleEdges | None = None


Report = Callable[[int, Stage], None]
"""Called with an edge and a stage: this edge and all after it are decided."""


def in_groups(
    cuts: FullCuts,
    targets: Targets,
    threshold: float,
    start: int,
    stage: Stage,
    report: Report,
    *,
    batch_size: int = 8,
) -> None:
    """Decide the edges before `start` in groups, restore edges, and try every kept edge by itself.

    With any `start` and `stage` that were reported, and the mask then, a search continues as if it
    had never stopped.
    """
    guess = _gradient(cuts, targets, mask_path(ORDER_STEPS), ORDER_STEPS, batch_size).clamp(min=0)
    singles = stage.singles
    if singles is None:
        groups = _Groups(cuts, guess, threshold, stage.reach)
        for read_index in reversed(range(len(cuts.graph.reads))):
            edges = [edge for edge in to_decide(cuts, read_index) if edge < start]
            groups.remove(read_index, sorted(edges, key=lambda edge: float(guess[edge])))
            report(min(start, cuts.graph.reads[read_index].first_edge), Stage(groups.reach))
        _restore(cuts, targets, threshold, batch_size)
        singles = SingleEdges.first(cuts)
        report(0, Stage(singles=singles))
    try_each(cuts, threshold, guess, singles, lambda: report(0, Stage(singles=singles)))


class _Groups:
    """Groups of edges to remove; `reach` is adapted from group to group."""

    def __init__(
        self,
        cuts: FullCuts,
        guess: Float[Tensor, " edge"],
        threshold: float,
        reach: float | None,
    ) -> None:
        self.cuts, self.threshold = cuts, threshold
        self.guess: list[float] = guess.tolist()
        self.reach = threshold if reach is None else reach

    def remove(self, read_index: int, edges: Sequence[int]) -> None:
        """Decide these edges of a read, in this order: all at once, or group by group."""
        if len(edges) > 1 and self._try_removing(read_index, edges)[0]:
            return
        n_decided, max_size = 0, len(edges) // 2 or 1
        while n_decided < len(edges):
            group, predicted = self._next_group(edges[n_decided : n_decided + max_size])
            removed, rise = self._try_removing(read_index, group)
            if removed or len(group) == 1:
                n_decided += len(group)
            max_size = GROWTH * len(group) if removed else max(1, len(group) // 2)
            if removed or len(group) > 1:
                self._adapt_reach(predicted, rise)

    def _try_removing(self, read_index: int, group: Sequence[int]) -> tuple[bool, float]:
        """Remove a group if it costs less than the threshold. Whether it did, and its rise."""
        (value,) = self.cuts.values(read_index, _cut(self.cuts, read_index, group))
        rise = value - self.cuts.value
        if rise < self.threshold:
            self.cuts.commit(0)
        return rise < self.threshold, rise

    def _adapt_reach(self, predicted: float, rise: float) -> None:
        """Set reach so that the next group should cost `AIM` thresholds, if the ratio of measured
        to predicted rise stays the same.
        """
        if rise > 0:
            aim = predicted * AIM * self.threshold / rise
            self.reach = min(aim, max(self.reach, GROWTH * predicted))
        else:
            self.reach = max(self.reach, GROWTH * predicted)

    def _next_group(self, edges: Sequence[int]) -> tuple[Sequence[int], float]:
        """The first edges within reach, at least one, and the sum of their predictions."""
        predicted, count = 0.0, 0
        for edge in edges:
            if count and predicted + self.guess[edge] > self.reach:
                break
            predicted, count = predicted + self.guess[edge], count + 1
        return edges[:count], predicted


def _gradient(
    cuts: FullCuts, targets: Targets, path: Path, points: int, batch_size: int
) -> Float[Tensor, " edge"]:
    """The predicted rise of each edge."""
    cuts.runs += GRADIENT_RUNS * points
    return path_scores(cuts.run, targets, path, cuts.loss_of, batch_size=batch_size)


def _restore(cuts: FullCuts, targets: Targets, threshold: float, batch_size: int) -> None:
    """Restore the removed edges with the highest predictions, if that lowers the objective."""
    if not cuts.mask.any() or bool(cuts.mask.all()):
        return
    guess = _gradient(cuts, targets, path_at(cuts.mask), 1, batch_size)
    guess[cuts.mask] = -torch.inf
    best = guess.topk(math.ceil(RESTORED * int(cuts.mask.sum())))
    restored = best.indices[best.values >= threshold]
    if not len(restored):
        return
    mask, value = cuts.mask.clone(), cuts.value
    larger_mask = mask.clone()
    larger_mask[restored] = True
    cuts.set(larger_mask)
    if not cuts.value < value:
        cuts.set(mask)


def _cut(cuts: FullCuts, read_index: int, edges: Sequence[int]) -> Tensor:
    """One candidate that cuts these edges, [1, destination, source]."""
    read = cuts.graph.reads[read_index]
    cut = torch.zeros(read.n_destinations * read.n_sources, dtype=torch.bool)
    cut[torch.tensor(edges) - read.first_edge] = True
    return cut.view(1, read.n_destinations, read.n_sources)
