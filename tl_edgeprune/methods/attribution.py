"""Scores from the mask's gradient: EAP, mask-IG and EAP-IG in one pass each over the task.

The masked forward gives d loss / d z for every edge at once. Then
- EAP is -d loss/d z at z = 1: (ref - y) . grad of the loss at the destination (Syed et al. 2023).
- mask-IG averages it over masks z = s, s on a path from 0 to 1.
- EAP-IG averages the destinations' gradients over inputs on the path from corrupted to clean, and
  takes them against the clean run's differences (Hanna et al. 2024, inputs).
Scores are means over the task's pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.graph import EdgeGraph
from tl_edgeprune.hooks import is_folded
from tl_edgeprune.masked import InputPath, MaskedModel
from tl_edgeprune.objectives import Objective, find_objective, has_logit_diff, kl
from tl_edgeprune.scores import EdgeScores
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.teacher import Lesson, Teacher

# One point of a path: the mask to run with, and the input path if it is the input that moves.
Point = tuple[Float[Tensor, " edge"], InputPath | None]
Path = Callable[[MaskedModel, Lesson], Iterator[Point]]


def eap(
    model: Any, task: Task, *, objective: str | Objective | None = None, **settings: Any
) -> EdgeScores:
    """Edge attribution patching (Syed et al. 2023, equation 2), by one gradient at z = 1.

    The default objective is the logit difference of answer and distractor: the KL to the model's
    own output has no gradient at z = 1, and is refused (ValueError).
    """
    objective = _differentiable_at_one(objective, task)
    return _scores("eap", _whole, model, task, objective, **settings)


def mask_ig(
    model: Any,
    task: Task,
    *,
    objective: str | Objective | None = None,
    steps: int = 5,
    **settings: Any,
) -> EdgeScores:
    """The mask's gradient averaged over z = (1/2, 3/2, …)/steps, every edge alike."""
    return _scores("mask-ig", mask_path(steps), model, task, objective, steps=steps, **settings)


def mask_path(steps: int) -> Path:
    """Masks with every edge at the same z, at the midpoints of `steps` parts of [0, 1]."""

    def path(run: MaskedModel, lesson: Lesson) -> Iterator[Point]:
        for step in range(steps):
            yield torch.full((run.graph.n_edges,), (step + 0.5) / steps), None

    return path


def eap_ig(
    model: Any,
    task: Task,
    *,
    objective: str | Objective | None = None,
    steps: int = 5,
    **settings: Any,
) -> EdgeScores:
    """EAP with integrated gradients over inputs, at shares 1/steps, 2/steps, …, 1 of the clean one.

    Hanna et al. 2024, equation 5; the input is what enters block 0.
    """

    def path(run: MaskedModel, lesson: Lesson) -> Iterator[Point]:
        contract = run.differences(lesson.batch.clean, lesson.reference)
        for step in range(1, steps + 1):
            yield torch.ones(run.graph.n_edges), InputPath(step / steps, contract)

    return _scores("eap-ig", path, model, task, objective, steps=steps, **settings)


def _whole(run: MaskedModel, lesson: Lesson) -> Iterator[Point]:
    yield torch.ones(run.graph.n_edges), None


def _scores(
    method: str,
    path: Path,
    model: Any,
    task: Task,
    objective: str | Objective | None,
    *,
    graph: EdgeGraph | None = None,
    ablation: str = "counterfactual",
    batch_size: int = 8,
    steps: int = 1,
) -> EdgeScores:
    loss_of = find_objective(objective, task)
    with MaskedModel.attach(model, graph) as run:
        teacher = Teacher(run, task, ablation, batch_size=batch_size, max_bytes=0)
        scores = path_scores(run, teacher, path, loss_of, steps=steps, batch_size=batch_size)
    name = (
        objective if isinstance(objective, str) else getattr(objective, "__name__", task.objective)
    )
    metadata = {"method": method, "task": task.name, "objective": name, "ablation": ablation}
    metadata["folded"] = is_folded(model)
    return EdgeScores(run.graph, scores, metadata)


def path_scores(
    run: MaskedModel,
    teacher: Teacher,
    path: Path,
    loss_of: Objective,
    *,
    steps: int = 1,
    batch_size: int = 8,
    max_pairs: int | None = None,
    progress: bool = False,
) -> Float[Tensor, " edge"]:
    """-d loss/d mask, mean over the teacher's pairs and over the `steps` points of a path (CPU).

    `max_pairs`: look at no more than about so many pairs.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: a path needs at least one point.")
    total, pairs = torch.zeros(run.graph.n_edges, device=teacher.device), 0
    batches = list(teacher.task.batches(batch_size, shuffle=max_pairs is not None))
    if max_pairs is not None:
        batches = batches[: math.ceil(max_pairs / batch_size)]
    for batch in tqdm(batches, "scoring edges", disable=not progress, leave=False):
        pairs += len(batch)
        lesson = teacher.lesson(batch)
        for mask, point in path(run, lesson):
            total -= _gradient(run, lesson, mask.to(teacher.device), point, loss_of) / steps
    return (total / pairs).cpu()


def _gradient(
    run: MaskedModel, lesson: Lesson, mask: Tensor, point: InputPath | None, loss_of: Objective
) -> Float[Tensor, " edge"]:
    """d (sum of the prompts' losses) / d mask."""
    mask = mask.requires_grad_()
    with torch.enable_grad():
        logits = run(lesson.batch.clean, mask, lesson.reference, lesson.batch.positions, point)
        loss = loss_of(logits, lesson.full, lesson.batch).sum()
        (grad,) = torch.autograd.grad(loss, mask)
    return grad


def _differentiable_at_one(objective: str | Objective | None, task: Task) -> str | Objective:
    if objective is None and has_logit_diff(task):
        return "logit-diff"
    if objective in (None, "kl", "mse") or objective is kl:
        raise ValueError(
            f"objective {objective or task.objective!r} is smallest at the full model, so its "
            "gradient there is zero and EAP's scores would be noise. Use 'logit-diff' (it needs an "
            "answer and a distractor of one token each), 'log-prob', mask_ig or eap_ig."
        )
    return objective
