"""Edge Pruning as one ranking of all edges: log alphas under sampled budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_edgeprune.pruner import EdgePruner
from tl_edgeprune.scores import EdgeScores
from tl_edgeprune.tasks.task import Task


def edge_pruning(
    model: Any, task: Task, *, resume: str | Path | None = None, **settings: Any
) -> EdgeScores:
    """Log alphas of every edge; without `n_edges` the budgets are sampled, for circuits of any
    size. `settings` are EdgePruner's.

    `resume` is a checkpoint to go on from. Scores of a run that Ctrl-C ended early say so in their
    metadata ("finished": False).
    """
    result = EdgePruner(**settings).fit(model, task, resume=resume)
    if result.finished:
        return result.scores
    return replace(result.scores, metadata=result.metadata | {"finished": False})
