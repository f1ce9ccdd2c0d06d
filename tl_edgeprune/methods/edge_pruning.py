"""Edge Pruning as one ranking of all edges: log alphas under sampled budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.training.pruner import EdgePruner


def edge_pruning(
    model: Any, task: Task, *, resume: str | Path | None = None, **settings: Any
) -> EdgeScores:
    """Log alphas of every edge; without `n_edges` the budgets are sampled, for circuits of any
    size. `settings` are EdgePruner's; `resume` is a checkpoint to go on from.
    """
    return EdgePruner(**settings).scores(model, task, "edge-pruning", resume=resume)
