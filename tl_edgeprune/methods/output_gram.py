"""Inner products of the sources' differences, over all prompts and positions of a task."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.masked import MaskedModel
from tl_edgeprune.methods.gradients import each_lesson
from tl_edgeprune.teacher import Teacher


def output_gram(
    run: MaskedModel, teacher: Teacher, *, batch_size: int = 8, progress: bool = False
) -> Float[Tensor, "source source"]:
    """G[i, j] = sum over prompts and positions of (y_i - ref_i) . (y_j - ref_j), clean run, CPU."""
    total = torch.zeros(run.graph.n_sources, run.graph.n_sources, dtype=torch.float64)
    for lesson in each_lesson(teacher, batch_size=batch_size, progress=progress):
        rows = run.differences(lesson.batch.clean, lesson.reference).flatten(1).float()
        total += (rows @ rows.T).double().cpu()
    return total
