"""EAP with integrated gradients over inputs: gradients between the corrupted input and the clean.

The input moves on a straight line; the destinations' gradients are averaged over it and taken
against the clean run's differences. Hanna, Pezzelle and Belinkov 2024, "Have Faith in
Faithfulness", eq. 5. `clean_corrupted` takes the line's two ends alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.forward_pass import Held
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.methods.gradients import (
    Path,
    Point,
    check_steps,
    differentiable_at_one,
    scores_along,
)
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.targets import Lesson
from tl_edgeprune.tasks.task import Task


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


def input_path(shares: Sequence[float]) -> Path:
    """The full model, its input held at these shares of the way to the clean one."""

    def path(run: MaskedModel, lesson: Lesson) -> Iterator[Point]:
        contract = run.differences(lesson.batch.clean, lesson.reference)
        inputs = range(run.graph.n_inputs)
        for share in shares:
            yield Point(torch.ones(run.graph.n_edges), Held(inputs, share), contract)

    return path
