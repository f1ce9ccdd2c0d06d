"""ACDC by groups: remove many edges in one run, and look closer only where that hurts.

1. The mask's gradient, averaged over z (mask-IG, `ORDER_STEPS` points), guesses each edge's rise.
2. Reads are visited as in ACDC, from the logits back. Within a read, edges come in the order of
   that guess, the least harmful first.
3. The next `size` edges are removed at once if together they raise the objective by less than the
   threshold; size then doubles twice. If not, size halves twice, until one edge is tried by itself,
   as in ACDC, and kept.
4. The mask's gradient at what is left tells which removed edges would lower the objective by the
   threshold if they came back; the best of them do, up to a quarter as many as are left. What
   looked dispensable before its companions went is not.
5. Every kept edge is tried by itself once more, pass after pass, until a pass removes none: so each
   edge of the circuit raises the objective by at least the threshold when cut.

A group goes only where all of it costs less than one edge may. Runs are two or three for each edge
kept, and few for those removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.cuts import WholeCuts
from tl_edgeprune.masked import MaskedModel
from tl_edgeprune.methods.gradients import Path, Point, path_scores
from tl_edgeprune.methods.mask_ig import mask_path
from tl_edgeprune.methods.sequence import decide, to_decide
from tl_edgeprune.teacher import Lesson, Teacher

ORDER_STEPS = 5
GRADIENT_RUNS = 3  # what a forward and a backward under masks count as
GROWTH = 4
RESTORED = 0.25


def in_groups(
    cuts: WholeCuts,
    teacher: Teacher,
    threshold: float,
    start: int,
    report: Callable[[int], None],
    *,
    batch_size: int = 8,
) -> None:
    """Remove what can go of the edges before `start`, put back what is missed, and try every kept
    edge by itself.
    """
    scores = _gradient(cuts, teacher, mask_path(ORDER_STEPS), ORDER_STEPS, batch_size)
    for place in reversed(range(len(cuts.graph.reads))):
        edges = [edge for edge in to_decide(cuts, place) if edge < start]
        edges.sort(key=lambda edge: float(scores[edge]))
        _remove_groups(cuts, place, edges, threshold)
        report(min(start, cuts.graph.reads[place].first_edge))
    _restore(cuts, teacher, threshold, batch_size)
    while _pass(cuts, threshold, scores):
        report(0)


def _gradient(
    cuts: WholeCuts, teacher: Teacher, path: Path, points: int, batch_size: int
) -> Float[Tensor, " edge"]:
    """A guess of each edge's rise."""
    cuts.runs += GRADIENT_RUNS * points
    return path_scores(cuts.run, teacher, path, cuts.loss_of, batch_size=batch_size)


def _restore(cuts: WholeCuts, teacher: Teacher, threshold: float, batch_size: int) -> None:
    """Put back the removed edges of the highest guess, if that lowers the objective."""

    def here(run: MaskedModel, lesson: Lesson) -> Iterator[Point]:
        yield Point(cuts.mask.float())

    if not cuts.mask.any() or bool(cuts.mask.all()):
        return
    guess = _gradient(cuts, teacher, here, 1, batch_size)
    guess[cuts.mask] = -torch.inf
    best = guess.topk(math.ceil(RESTORED * int(cuts.mask.sum())))
    before, value = cuts.mask.clone(), cuts.value
    wider = cuts.mask.clone()
    wider[best.indices[best.values >= threshold]] = True
    cuts.set(wider)
    if not cuts.value < value:
        cuts.set(before)


def _pass(cuts: WholeCuts, threshold: float, scores: Float[Tensor, " edge"]) -> int:
    """Try every kept edge by itself. How many go."""
    removed = 0
    for place in reversed(range(len(cuts.graph.reads))):
        edges = sorted(to_decide(cuts, place), key=lambda edge: float(scores[edge]))
        removed += decide(cuts, place, edges, threshold, removal_likely=False)
    return removed


def _remove_groups(cuts: WholeCuts, place: int, edges: Sequence[int], threshold: float) -> None:
    """Groups that grow while they go and shrink while they do not."""
    done, size = 0, len(edges)
    while done < len(edges):
        group = edges[done : done + size]
        (value,) = cuts.values(place, _cut(cuts, place, group))
        if value - cuts.value < threshold:
            cuts.commit(0)
            done += len(group)
            size *= GROWTH
        elif len(group) == 1:
            done += 1
        else:
            size = max(1, len(group) // GROWTH)


def _cut(cuts: WholeCuts, place: int, edges: Sequence[int]) -> Tensor:
    """One candidate that cuts these edges, [1, destination, source]."""
    read = cuts.graph.reads[place]
    cut = torch.zeros(read.n_destinations * read.n_sources, dtype=torch.bool)
    cut[torch.tensor(edges) - read.first_edge] = True
    return cut.view(1, read.n_destinations, read.n_sources)
