"""Edge attribution patching: one gradient at the full model.

An edge's score is (ref - y) . d loss / d x: what its removal would change to first order, y and ref
its source's output on the clean and the corrupted prompt, x its destination's input.
Syed, Rager and Conmy 2023, "Attribution Patching Outperforms Automated Circuit Discovery", eq. 2.
"""

from __future__ import annotations

from typing import Any

from tl_edgeprune.attribution.mask_gradient import differentiable_at_one, scores_along
from tl_edgeprune.attribution.paths import full_mask_path
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.methods.registry import register
from tl_edgeprune.objectives import Objective
from tl_edgeprune.tasks.task import Task


@register("eap", forwards_to=scores_along, gradients=1)
def eap(
    model: Any, task: Task, *, objective: str | Objective | None = None, **settings: Any
) -> EdgeScores:
    """Score every edge by one gradient at z = 1.

    The default objective is the logit difference of answer and distractor: the KL to the model's
    own output has no gradient at z = 1, and is refused (ValueError). `settings`: graph, ablation,
    batch_size, progress.
    """
    objective = differentiable_at_one(objective, task, "EAP")
    return scores_along(
        full_mask_path, model, task, objective, metadata={"method": "eap"}, **settings
    )
