"""Random scores: what a method has to beat."""

from __future__ import annotations

from typing import Any

import torch

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.ablation.kinds import check_ablation
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods.registry import register
from tl_edgeprune.runs.provenance import origin
from tl_edgeprune.tasks.task import Task


@register("random")
def random_scores(
    model: Any,
    task: Task,
    *,
    seed: int = 0,
    graph: EdgeGraph | None = None,
    ablation: Ablation = "counterfactual",
) -> EdgeScores:
    """Uniform numbers from 0 to 1, the same for one seed; the model is not run."""
    check_ablation(ablation)
    graph = graph or EdgeGraph.from_model(model)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(graph.n_edges, generator=generator)
    return EdgeScores(
        graph, scores, origin(model, task, method="random", seed=seed, ablation=ablation)
    )
