"""Edge Pruning: a mask on every edge, trained by gradient.

Reading order: `pruner` (EdgePruner), `settings` (each declared once), `trainer` (the loop), `gates`
(hard concrete), `controllers` (sparsity), `gate_group` and `first_gates` (edges, sources, neurons),
`best_ranking`, `batch_stream`, `trainer_state` (checkpoints), `result`; `regularisers`,
`learned_constants` and `optimal_constants` (optimal ablation).
"""

from tl_edgeprune.training.controllers import Controller, ExactBudget, Lagrangian, Penalty
from tl_edgeprune.training.pruner import EdgePruner
from tl_edgeprune.training.regularisers import Attachment
from tl_edgeprune.training.result import PruneResult
from tl_edgeprune.training.settings import Optimizer, PrunerSettings

__all__ = [
    "Attachment",
    "Controller",
    "EdgePruner",
    "ExactBudget",
    "Lagrangian",
    "Optimizer",
    "Penalty",
    "PruneResult",
    "PrunerSettings",
]
