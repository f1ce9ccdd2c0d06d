"""Scores from inner products of the sources' outputs: how much they are alike, and how large."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.attribution.mask_gradient import scores_of_run
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.spans import refuse_spans
from tl_edgeprune.runs.resume import UNSAVED, Saved
from tl_edgeprune.runs.targets import TargetBatch, Targets
from tl_edgeprune.runs.totals import total_over_pairs
from tl_edgeprune.tasks.task import Task

Gram = Float[Tensor, "source source"]


def scores_of_gram(
    score: Callable[[EdgeGraph, Gram], Tensor],
    method: str,
    model: Any,
    task: Task,
    by_magnitude: bool = True,
    *,
    graph: EdgeGraph | None = None,
    ablation: Ablation = "counterfactual",
    batch_size: int = 8,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EdgeScores:
    """The scores that a method makes of the graph and the task's `output_gram`.

    checkpoint: a file to save to every half minute; if it exists, the run continues from it.
    """
    refuse_spans(graph, method)

    def scores(run: MaskedModel, targets: Targets, saved: Saved) -> Float[Tensor, " edge"]:
        gram = output_gram(run, targets, batch_size=batch_size, progress=progress, saved=saved)
        return score(run.graph, gram).float()

    return scores_of_run(
        scores,
        model,
        task,
        graph=graph,
        metadata={"method": method, "objective": "none", "ablation": ablation},
        batch_size=batch_size,
        by_magnitude=by_magnitude,
        needs_targets=False,
        checkpoint=checkpoint,
    )


def output_gram(
    run: MaskedModel,
    targets: Targets,
    *,
    batch_size: int = 8,
    progress: bool = False,
    saved: Saved = UNSAVED,
) -> Float[Tensor, "source source"]:
    """G[i, j] = sum over prompts and positions of (y_i - ref_i) . (y_j - ref_j), clean run, CPU."""

    def products(target_batch: TargetBatch) -> Float[Tensor, "source source"]:
        rows = run.differences(target_batch.batch.clean, target_batch.reference).flatten(1).float()
        return (rows @ rows.T).double().cpu()

    zeros = torch.zeros(run.graph.n_sources, run.graph.n_sources, dtype=torch.float64)
    return total_over_pairs(
        products, zeros, targets, batch_size=batch_size, progress=progress, saved=saved
    )[0]
