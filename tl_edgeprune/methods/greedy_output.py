"""Greedy output approximation: the sources that best rebuild what a destination reads.

For each destination alone, the model's objective aside: starting from the reference stream, add the
source that brings the input nearest to its clean value (squared distance over prompts and
positions), and again, until all are in. The score is the share of the first distance that adding
the source took away, never above that of one chosen before it. A baseline from pruning in general
(as greedy output approximation prunes a layer's neurons); the destinations of a read score alike.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.attribution.output_gram import scores_of_gram
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods.registry import register
from tl_edgeprune.tasks.task import Task


@register("greedy-output", forwards_to=scores_of_gram)
def greedy_output(model: Any, task: Task, **settings: Any) -> EdgeScores:
    """Scores of at most 1 (at times below 0: late sources can lead away again).

    `settings`: graph, ablation, batch_size, progress.
    """
    return scores_of_gram(_edge_gains, "greedy-output", model, task, by_magnitude=False, **settings)


def _edge_gains(graph: EdgeGraph, gram: Float[Tensor, "source source"]) -> Float[Tensor, " edge"]:
    grams = [
        greedy_gains(gram[: read.n_sources, : read.n_sources]).repeat(read.n_destinations)
        for read in graph.reads
    ]
    return torch.cat(grams)


def greedy_gains(gram: Float[Tensor, "source source"]) -> Float[Tensor, " source"]:
    """What each source takes off |sum of all|^2 when it is added, in greedy order, never rising.

    The distance that is left, with sources R still out, is the sum of G over R x R; taking j from R
    lowers it by 2 sum_R G[:, j] - G[j, j].
    """
    gains = torch.zeros(len(gram), dtype=gram.dtype)
    out = torch.ones(len(gram), dtype=torch.bool)
    toward, last = gram.sum(0), float("inf")
    total = max(float(gram.sum()), torch.finfo(gram.dtype).tiny)
    for _ in range(len(gram)):
        gain = (2 * toward - gram.diagonal()).masked_fill(~out, -float("inf"))
        best = int(gain.argmax())
        last = min(last, float(gain[best]) / total)
        gains[best], out[best] = last, False
        toward = toward - gram[best]
    return gains
