"""Subspace node pruning: sources ranked by the variance that only they add.

The sources' outputs (as differences from the reference) are orthogonalised one by one, the one with
the most variance left first; what is left of it then is its score, as a share of all. A source that
others span scores 0 however large it is. Node scores, made edge scores as in hisp.py. After
Offergeld, van Gerven and Ahmad 2024, "Subspace Node Pruning".
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.attribution.output_gram import scores_of_gram
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods.hisp import node_to_edge_scores
from tl_edgeprune.methods.registry import register
from tl_edgeprune.tasks.task import Task


@register("subspace-nodes", forwards_to=scores_of_gram)
def subspace_nodes(model: Any, task: Task, **settings: Any) -> EdgeScores:
    """Edge scores from 0 to 1: shares of the variance of the less important end.

    `settings`: graph, ablation, batch_size, progress.
    """
    return scores_of_gram(_edge_shares, "subspace-nodes", model, task, **settings)


def _edge_shares(graph: EdgeGraph, gram: Float[Tensor, "source source"]) -> Float[Tensor, " edge"]:
    return node_to_edge_scores(graph, variance_left(gram).float())


def variance_left(gram: Float[Tensor, "source source"]) -> Float[Tensor, " source"]:
    """Each vector's squared norm when it is chosen, less what those before it span, over the sum.

    Gram-Schmidt with the largest remainder first, that is, a pivoted Cholesky decomposition of G.
    """
    residual, scores = gram.clone(), torch.zeros(len(gram), dtype=gram.dtype)
    total = max(float(gram.diagonal().sum()), torch.finfo(gram.dtype).tiny)
    chosen = torch.zeros(len(gram), dtype=torch.bool)
    for _ in range(len(gram)):
        norms = residual.diagonal().masked_fill(chosen, -float("inf"))
        best = int(norms.argmax())
        norm = float(norms[best])
        chosen[best] = True
        if norm <= 1e-10 * total:
            break
        scores[best] = norm / total
        residual = residual - torch.outer(residual[:, best], residual[best]) / norm
    return scores
