"""Head importance score for pruning: each source by the gradient's product with its difference.

A source's importance is the mean over pairs of |(y - ref) . d loss / d y|; an edge is as important
as the less important of its source and the node that it leads to, so the top edges are those
between the top nodes. Michel, Levy and Neubig 2019, "Are Sixteen Heads Really Better than One?",
equation 2, as Conmy et al. 2023 compare with it (appendix B).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.attribution.mask_gradient import (
    differentiable_at_one,
    edge_gradient,
    scores_of_run,
)
from tl_edgeprune.attribution.paths import full_mask_path
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.edge_indices import edge_ends
from tl_edgeprune.graph.spans import refuse_spans
from tl_edgeprune.methods.registry import register
from tl_edgeprune.objectives import Objective, find_objective
from tl_edgeprune.runs.resume import Saved
from tl_edgeprune.runs.targets import TargetBatch, Targets
from tl_edgeprune.runs.totals import total_over_pairs
from tl_edgeprune.tasks.task import Task


@register("hisp")
def hisp(
    model: Any,
    task: Task,
    *,
    objective: str | Objective | None = None,
    graph: EdgeGraph | None = None,
    ablation: Ablation = "counterfactual",
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EdgeScores:
    """Edge scores >= 0 from nodes' importance; one gradient a pair. objective: as for EAP;
    checkpoint: a file to save to every half minute; if it exists, the run continues from it.
    """
    refuse_spans(graph, "hisp")
    objective = differentiable_at_one(objective, task, "HISP")
    loss_of = find_objective(objective, task)

    def nodes(run: MaskedModel, targets: Targets, saved: Saved) -> Float[Tensor, " edge"]:
        source_of, _ = edge_ends(run.graph)
        zeros = torch.zeros(run.graph.n_sources)

        def importance(target_batch: TargetBatch) -> Float[Tensor, " source"]:
            (point,) = full_mask_path(run, target_batch)
            grad = edge_gradient(run, target_batch, point, loss_of).cpu()
            return torch.zeros_like(zeros).index_add_(0, source_of, grad).abs()

        total, pairs = total_over_pairs(
            importance, zeros, targets, batch_size=1, progress=progress, saved=saved
        )
        return node_to_edge_scores(run.graph, total / pairs)

    metadata = {"method": "hisp", "objective": objective, "ablation": ablation}
    return scores_of_run(nodes, model, task, graph=graph, metadata=metadata, checkpoint=checkpoint)


def node_to_edge_scores(
    graph: EdgeGraph, sources: Float[Tensor, " source"]
) -> Float[Tensor, " edge"]:
    """An edge's score: the lesser of its source's and of the best source that it leads into.

    The inputs and the logits are in every circuit: they bound nothing, unless an edge joins the two
    directly, which then has the inputs' own score.
    """
    index_of = {name: index for index, name in enumerate(graph.sources)}
    importances = sources.clone()
    importances[: graph.n_inputs] = float("inf")
    into = [
        max((float(sources[index_of[n]]) for n in graph.owner(d)), default=float("inf"))
        for d in graph.destinations
    ]
    source, destination = edge_ends(graph)
    scores = torch.minimum(importances[source], torch.tensor(into)[destination])
    return torch.where(torch.isinf(scores), sources[source], scores)
