"""ACDC by groups: remove many edges in one run, and look closer only where that hurts.

1. The mask's gradient, averaged over z (mask-IG, `ORDER_STEPS` points), guesses each edge's rise.
2. Reads are visited as in ACDC, from the logits back. Within a read, edges come in the order of
   that guess, the least harmful first.
3. The next `size` edges are removed at once if together they raise the objective by less than the
   threshold; size then doubles twice. If not, size halves twice, until one edge is tried by itself,
   as in ACDC, and kept.
4. At the end every kept edge is tried by itself once more, pass after pass, until a pass removes
   none: so each edge of the circuit raises the objective by at least the threshold when cut.

A group goes only where all of it costs less than one edge may, so groups are more careful than
single edges, and the circuit is no worse for them. Runs are about two for each edge kept, and few
for those removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.cuts import WholeCuts
from tl_edgeprune.masked import MaskedModel
from tl_edgeprune.objectives import Objective
from tl_edgeprune.teacher import Teacher

ORDER_STEPS = 5
ORDER_RUNS = 3 * ORDER_STEPS  # a forward and a backward under masks, in runs
GROWTH = 4
MOST_PASSES = 20


def order(
    run: MaskedModel, teacher: Teacher, loss_of: Objective, *, batch_size: int = 8
) -> Float[Tensor, " edge"]:
    """A guess of each edge's rise."""
    from tl_edgeprune.methods.gradients import path_scores
    from tl_edgeprune.methods.mask_ig import mask_path

    return path_scores(run, teacher, mask_path(ORDER_STEPS), loss_of, batch_size=batch_size)


def in_groups(
    cuts: WholeCuts,
    threshold: float,
    scores: Float[Tensor, " edge"],
    start: int,
    report: Callable[[int], None],
) -> None:
    """Remove what can go of the edges before `start`, then try every kept edge by itself."""
    from tl_edgeprune.methods.acdc import decide, to_decide

    for place in reversed(range(len(cuts.graph.reads))):
        edges = [edge for edge in to_decide(cuts, place) if edge < start]
        edges.sort(key=lambda edge: float(scores[edge]))
        _remove_groups(cuts, place, edges, threshold)
        report(min(start, cuts.graph.reads[place].first_edge))
    for _ in range(MOST_PASSES):
        removed = 0
        for place in reversed(range(len(cuts.graph.reads))):
            edges = sorted(to_decide(cuts, place), key=lambda edge: float(scores[edge]))
            removed += decide(cuts, place, edges, threshold, removal_likely=False)
        report(0)
        if not removed:
            return


def _remove_groups(
    cuts: WholeCuts, place: int, edges: Sequence[int], threshold: float
) -> None:
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
