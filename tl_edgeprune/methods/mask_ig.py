"""Integrated gradients over the mask: every edge alike at z = s, s on a path from 0 to 1.

The first-order guess of EAP, averaged between the empty circuit and the full model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.methods.gradients import Path, Point, check_steps, scores_along
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.targets import Lesson
from tl_edgeprune.tasks.task import Task


def mask_ig(
    model: Any,
    task: Task,
    *,
    objective: str | Objective | None = None,
    steps: int = 5,
    **settings: Any,
) -> EdgeScores:
    """The mask's gradient averaged over z = (1/2, 3/2, …)/steps; objective: the task's own."""
    metadata = {"method": "mask-ig", "steps": steps}
    return scores_along(mask_path(steps), model, task, objective, metadata=metadata, **settings)


def mask_path(steps: int) -> Path:
    """Masks with every edge at the same z, at the midpoints of `steps` parts of [0, 1]."""
    check_steps(steps)

    def path(run: MaskedModel, lesson: Lesson) -> Iterator[Point]:
        for step in range(steps):
            yield Point(torch.full((run.graph.n_edges,), (step + 0.5) / steps))

    return path
