"""Edge Pruning as one ranking of all edges: log alphas under sampled budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.methods.registry import register
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.training.pruner import EdgePruner


@register("edge-pruning", forwards_to=EdgePruner, trained=True)
def edge_pruning(
    model: Any,
    task: Task,
    *,
    n_edges: int | None = None,
    resume: str | Path | None = None,
    **settings: Any,
) -> EdgeScores:
    """Log alphas of every edge.

    Args:
        n_edges: the size to train for; by default budgets are sampled, for circuits of any size.
        resume: a checkpoint to continue from.
        settings: EdgePruner's.
    """
    return EdgePruner(n_edges, **settings).scores(model, task, "edge-pruning", resume=resume)
