"""Integrated gradients over the mask: every edge alike at z = s, s on a path from 0 to 1.

The first-order guess of EAP, averaged between the empty circuit and the full model.
"""

from __future__ import annotations

from typing import Any

from tl_edgeprune.attribution.mask_gradient import scores_along
from tl_edgeprune.attribution.paths import mask_path
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.methods.registry import register
from tl_edgeprune.objectives import Objective
from tl_edgeprune.tasks.task import Task


@register("mask-ig", forwards_to=scores_along, gradients="steps")
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
