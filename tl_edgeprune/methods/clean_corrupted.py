"""Clean-corrupted attribution: EAP's gradient, averaged over the clean and the corrupted input.

The two ends of EAP-IG's path (Marks et al. 2024, "Sparse Feature Circuits"; as in EAP-IG's code).
"""

from __future__ import annotations

from typing import Any

from tl_edgeprune.attribution.mask_gradient import scores_along
from tl_edgeprune.attribution.paths import input_path
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.methods.registry import register
from tl_edgeprune.objectives import Objective
from tl_edgeprune.tasks.task import Task


@register("clean-corrupted", forwards_to=scores_along, gradients=2)
def clean_corrupted(
    model: Any, task: Task, *, objective: str | Objective | None = None, **settings: Any
) -> EdgeScores:
    """The mean of the gradients on the clean and on the corrupted input, against the differences.

    objective: the task's own (at the corrupted input the KL has a gradient).
    """
    metadata = {"method": "clean-corrupted"}
    return scores_along(
        input_path((0.0, 1.0)), model, task, objective, metadata=metadata, **settings
    )
