"""Scores from the mask's gradient, shared by EAP, mask-IG, EAP-IG and similar methods.

1. The masked forward gives d loss / d z for every edge at once.
2. A method is a path: the points at which it takes that gradient. A point is a mask, sources that
   are held at a share of their difference, and the differences to take the gradient against.
3. An edge's score is -d loss / d z, mean over the points and over the task's pairs, so a score
   above 0 means that removing the edge raises the loss.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.attribution.paths import Path, Point
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.objectives import (
    WITHOUT_TARGETS,
    Objective,
    find_objective,
    has_logit_diff,
    kl,
    losses,
    mean_squared_error,
)
from tl_edgeprune.runs.chance_warning import ChanceWatch
from tl_edgeprune.runs.resume import UNSAVED, Saved
from tl_edgeprune.runs.session import open_session
from tl_edgeprune.runs.targets import TargetBatch, Targets
from tl_edgeprune.runs.totals import each_target_batch, total_over_pairs
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.utils.grad_mode import with_gradients


def scores_along(
    path: Path,
    model: Any,
    task: Task,
    objective: str | Objective | None,
    magnitudes: bool = False,
    *,
    metadata: dict[str, Any],
    graph: EdgeGraph | None = None,
    positions: str | None = None,
    ablation: Ablation = "counterfactual",
    batch_size: int = 8,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EdgeScores:
    """The mean of -d loss / d mask over a path's points, as scores with their origin.

    Args:
        path: the points at which the gradient is taken.
        objective: the task's own by default.
        metadata: the method and its settings.
        positions: "span" or "position" for edges with a mask in each (runs/task_checks.py).
        checkpoint: a file that the state is saved to every half minute; if it exists, the run
            continues from it.
        magnitudes: sum absolute values per point and batch instead of signed ones.
    """
    loss_of = find_objective(objective, task)

    def scores(run: MaskedModel, targets: Targets, saved: Saved) -> Float[Tensor, " edge"]:
        return path_scores(
            run,
            targets,
            path,
            loss_of,
            batch_size=batch_size,
            progress=progress,
            magnitudes=magnitudes,
            saved=saved,
        )

    metadata = {"objective": objective, "ablation": ablation, **metadata}
    return scores_of_run(
        scores,
        model,
        task,
        graph=graph,
        positions=positions,
        metadata=metadata,
        batch_size=batch_size,
        needs_targets=loss_of not in WITHOUT_TARGETS,
        checkpoint=checkpoint,
    )


def scores_of_run(
    score: Callable[[MaskedModel, Targets, Saved], Tensor],
    model: Any,
    task: Task,
    *,
    graph: EdgeGraph | None,
    metadata: dict[str, Any],
    batch_size: int = 8,
    by_magnitude: bool = True,
    needs_targets: bool = True,
    positions: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EdgeScores:
    """The scores of a function of the masked model, with their origin.

    Args:
        score: gives the scores, from the model with hooks attached, the task's targets and the
            saved state of a stopped run.
        metadata: method, ablation, objective and what else belongs to the scores.
        by_magnitude: whether edges are ranked by the scores' absolute values.
        needs_targets: whether the full model's logits are needed.

    Raises ValueError for scores that are NaN or infinite.
    """
    with open_session(
        model,
        task,
        graph=graph,
        positions=positions,
        needs_objective=False,
        ablation=metadata.get("ablation", "zero"),  # a method without one never reads a reference
        batch_size=batch_size,
        metadata={"ablation": "counterfactual", **metadata},
        settings={**metadata, "batch_size": batch_size},
        checkpoint=checkpoint,
        needs_targets=needs_targets,
        visits=0,
    ) as session:
        scores = score(session.run, session.targets, session.saved)
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            f"{metadata['method']} gives NaN or infinite scores on task {task.name!r}: check the "
            "model's weights and dtype before looking for a circuit in it."
        )
    return EdgeScores(session.graph, scores.cpu(), session.metadata, by_magnitude)


def path_scores(
    run: MaskedModel,
    targets: Targets,
    path: Path,
    loss_of: Objective,
    *,
    batch_size: int = 8,
    max_pairs: int | None = None,
    progress: bool = False,
    magnitudes: bool = False,
    saved: Saved = UNSAVED,
) -> Float[Tensor, " edge"]:
    """-d loss/d mask, mean over the task's pairs and over the points of a path (on the CPU).

    Args:
        max_pairs: use about this many pairs at most, drawn at random.
        magnitudes: sum absolute values per point and batch instead of signed ones.
        saved: the state that the sum continues from.
    """

    def batch_scores(target_batch: TargetBatch) -> Float[Tensor, " edge"]:
        per_point = [
            -edge_gradient(run, target_batch, point, loss_of, targets.watch)
            for point in path(run, target_batch)
        ]
        signed = (p.abs() if magnitudes else p for p in per_point)
        return sum(signed, torch.zeros(())) / len(per_point)

    total, pairs = total_over_pairs(
        batch_scores,
        torch.zeros(run.graph.n_edges, device=targets.device),
        targets,
        batch_size=batch_size,
        max_pairs=max_pairs,
        progress=progress,
        saved=saved,
    )
    return (total / pairs).cpu()


def edge_gradient(
    run: MaskedModel,
    target_batch: TargetBatch,
    point: Point,
    loss_of: Objective,
    watch: ChanceWatch | None = None,
) -> Float[Tensor, " edge"]:
    """d (sum of the prompts' losses) / d mask, at a point.

    `watch` counts the right answers in the logits if the point is the full model's run.
    """
    full_mask = bool((point.mask == 1).all())
    mask = point.mask.to(run.device).requires_grad_()
    with with_gradients("this method"):
        logits = run.logits(
            target_batch, mask, held=point.held, contract=point.contract, whole=full_mask
        )
        if watch is not None and full_mask and (point.held is None or point.held.share == 1):
            watch.see(logits, target_batch.batch)
        loss = losses(loss_of, logits, target_batch.full, target_batch.batch).sum()
        (grad,) = torch.autograd.grad(loss, mask)
    return grad


def differentiable_at_one(
    objective: str | Objective | None, task: Task, method: str
) -> str | Objective:
    """An objective with a gradient at the full model: by default the logit difference, if the task
    has one.

    Raises ValueError for the KL and the squared error, which are smallest there.
    """
    if objective is None and has_logit_diff(task):
        return "logit-diff"
    objective = task.objective if objective is None else objective
    if objective in ("kl", "mse", kl, mean_squared_error):
        name = getattr(objective, "__name__", objective)
        raise ValueError(
            f"objective {name!r} is smallest at the full model, so its gradient there is zero and "
            f"{method}'s scores would be noise. Use 'logit-diff' (it needs an answer and a "
            "distractor of one token each), 'prob-diff' (sets of right and wrong tokens), "
            "'log-prob', or a method that looks further: mask-ig, eap-ig."
        )
    return objective


def gate_scores(
    run: MaskedModel,
    targets: Targets,
    loss_of: Objective,
    *,
    steps: int = 5,
    batch_size: int = 8,
    max_pairs: int | None = None,
    progress: bool = False,
) -> Float[Tensor, "place unit"]:
    """-d loss/d gate, mean over the task's pairs and over gates (1/2, 3/2, …)/steps, on the CPU.

    Every edge is kept. `max_pairs`: use about this many pairs at most, drawn at random.
    """
    total, pairs = torch.zeros(run.neuron_shape), 0
    for target_batch in each_target_batch(
        targets,
        batch_size=batch_size,
        max_pairs=max_pairs,
        progress=progress,
        doing="scoring neurons",
    ):
        pairs += len(target_batch.batch)
        for step in range(steps):
            total -= _gate_gradient(run, target_batch, (step + 0.5) / steps, loss_of) / steps
    return total / pairs


def _gate_gradient(
    run: MaskedModel, target_batch: TargetBatch, gate: float, loss_of: Objective
) -> Float[Tensor, "place unit"]:
    """d (sum of the prompts' losses) / d gates, with every gate at the same value (on the CPU)."""
    mask = torch.ones(run.graph.n_edges, device=run.device)
    gates = mask.new_full(run.neuron_shape, gate).requires_grad_()
    with torch.enable_grad():
        logits = run.logits(target_batch, mask, whole=True, neurons=gates)
        loss = losses(loss_of, logits, target_batch.full, target_batch.batch).sum()
        (grad,) = torch.autograd.grad(loss, gates)
    return grad.cpu()
