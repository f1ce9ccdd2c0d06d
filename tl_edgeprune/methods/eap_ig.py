"""EAP with integrated gradients over inputs: gradients between the corrupted input and the clean.

The input moves on a straight line; the destinations' gradients are averaged over it and taken
against the clean run's differences. Hanna, Pezzelle and Belinkov 2024, "Have Faith in
Faithfulness", eq. 5. `clean_corrupted` takes the line's two ends alone.
"""

from __future__ import annotations

from typing import Any

from tl_edgeprune.attribution.mask_gradient import differentiable_at_one, scores_along
from tl_edgeprune.attribution.paths import check_steps, input_path
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.methods.registry import register
from tl_edgeprune.objectives import Objective
from tl_edgeprune.tasks.task import Task


@register("eap-ig", forwards_to=scores_along, gradients="steps")
def eap_ig(
    model: Any,
    task: Task,
    *,
    objective: str | Objective | None = None,
    steps: int = 5,
    **settings: Any,
) -> EdgeScores:
    """Gradients at 1/steps, 2/steps, …, 1 of the way from the corrupted to the clean input.

    The input is what enters block 0; objective: the task's own. With one step, that is EAP, and an
    objective without a gradient there is refused (ValueError).
    """
    check_steps(steps)
    if steps == 1:
        objective = differentiable_at_one(objective, task, "EAP-IG with one step")
    shares = [step / steps for step in range(1, steps + 1)]
    metadata = {"method": "eap-ig", "steps": steps}
    return scores_along(input_path(shares), model, task, objective, metadata=metadata, **settings)
