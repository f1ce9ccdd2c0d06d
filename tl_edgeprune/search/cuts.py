"""What cutting edges does to the objective: one mask, many candidate cuts, no gradients.

`WholeCuts` is the definition, `PartCuts` the same from partial runs. A check on a few tokens holds
the one to the other; where a model's blocks cannot be run in parts, `find_cuts` gives the
definition: the same, slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.self_check import relative, tolerance
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.targets import Lesson, Teacher
from tl_edgeprune.search.full_cuts import WholeCuts, first_pairs
from tl_edgeprune.search.partial_cuts import MAX_BYTES, PartCuts


def find_cuts(
    run: MaskedModel,
    teacher: Teacher,
    loss_of: Objective,
    *,
    batch_size: int = 8,
    max_bytes: int = MAX_BYTES,
) -> WholeCuts:
    """The fastest engine that this model allows, on all of the teacher's pairs."""
    lessons = [teacher.lesson(batch) for batch in teacher.task.batches(batch_size)]
    if partial_run_agrees(run, lessons[0]):
        return PartCuts(run, lessons, loss_of, max_bytes=max_bytes)
    return WholeCuts(run, lessons, loss_of)


@torch.no_grad()
def partial_run_agrees(run: MaskedModel, lesson: Lesson) -> bool:
    """Whether partial runs give whole runs' logits, for random cuts of some pairs' first read and
    of a middle one.
    """
    lesson = first_pairs(lesson)
    seen: list[Tensor] = []

    def keep(logits: Tensor, full: Tensor, batch: object) -> Tensor:
        seen.append(logits)
        return logits.new_zeros(len(logits))

    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(run.graph.n_edges, generator=generator) < 0.8
    whole, part = WholeCuts(run, [lesson], keep), PartCuts(run, [lesson], keep)
    figures = []
    for cuts in (whole, part):
        try:
            cuts.set(mask)
            for place in (0, len(run.graph.reads) // 2):
                read = run.graph.reads[place]
                shape = (2, read.n_destinations, read.n_sources)
                random = torch.Generator().manual_seed(place)
                cuts.losses(place, torch.rand(shape, generator=random) < 0.5)
                cuts.commit(1)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError):
            if cuts is whole:
                raise
            return False
        figures.append(torch.stack(seen))
        seen.clear()
    return relative(figures[1], figures[0]) <= tolerance(figures[0].dtype)
