"""Subnetwork probing on edges: hard-concrete masks under a fixed price on open gates.

Loss: the objective + weight * mean P(open); all gates start 90 % open. Cao, Sanh and Rush 2021,
"Low-Complexity Probing via Finding Subnetworks", with masks on edges in place of weights (as in
Conmy et al. 2023, section 4, for nodes).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.methods.registry import register
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.training.controllers import Penalty
from tl_edgeprune.training.pruner import EdgePruner


@register(
    "subnetwork-probing",
    forwards_to=EdgePruner,
    fixed=("controller", "init_scores", "init_log_alpha"),
    trained=True,
)
def subnetwork_probing(
    model: Any,
    task: Task,
    *,
    n_edges: int | None = None,
    weight: float = 10.0,
    lr: float = 0.1,
    resume: str | Path | None = None,
    **settings: Any,
) -> EdgeScores:
    """Log alphas after training under a fixed price on open gates.

    Args:
        weight: the price of the whole graph, in nats. A higher one gives better rankings of small
            circuits.
        lr: learning rate of the log alphas.
        resume: a checkpoint to continue from.
        settings: EdgePruner's.
    """
    start = math.log(0.9 / 0.1)
    pruner = EdgePruner(
        n_edges,
        lr=lr,
        controller=Penalty(weight),
        init_scores=None,
        init_log_alpha=(start, 0.01),
        **settings,
    )
    return pruner.scores(model, task, "subnetwork-probing", resume=resume)
