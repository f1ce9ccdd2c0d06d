"""Discovery methods by name: `discover(model, task, method="eap")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tl_edgeprune.methods.attribution import eap, eap_ig, mask_ig
from tl_edgeprune.pruner import EdgePruner
from tl_edgeprune.scores import EdgeScores
from tl_edgeprune.tasks.task import Task


def edge_pruning(model: Any, task: Task, **settings: Any) -> EdgeScores:
    """Log alphas of Edge Pruning under sampled budgets: one ranking for circuits of every size."""
    return EdgePruner(**settings).fit(model, task).scores


METHODS: dict[str, Callable[..., EdgeScores]] = {
    "edge-pruning": edge_pruning,
    "eap": eap,
    "eap-ig": eap_ig,
    "mask-ig": mask_ig,
}


def discover(model: Any, task: Task, method: str = "edge-pruning", **settings: Any) -> EdgeScores:
    """Score every edge of a model for a task.

    Args:
        method: a name in `METHODS`.
        settings: the method's own.

    Raises ValueError for an unknown method, and what the method raises.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}.")
    return METHODS[method](model, task, **settings)
