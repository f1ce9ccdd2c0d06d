"""Information flow routes: how much of what a destination reads each source makes up.

At every position, a source's share is max(0, |x|_1 - |x - y|_1), x what the destination reads and y
the source's output, normalised over the sources that it reads; the score is the mean over positions
and pairs. One forward pass on the clean prompts: no corrupted run, no objective. A read's queries,
keys and values have the same scores. Ferrando and Voita 2024, "Information Flow Routes", eq. 3, 4.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.attribution.mask_gradient import scores_of_run
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.spans import refuse_spans
from tl_edgeprune.methods.registry import register
from tl_edgeprune.runs.resume import Saved
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.runs.totals import total_over_pairs
from tl_edgeprune.tasks.task import Task


@register("ifr")
def ifr(
    model: Any,
    task: Task,
    *,
    graph: EdgeGraph | None = None,
    batch_size: int = 8,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EdgeScores:
    """Shares of every destination's input, 0 to 1; those of one destination add up to 1.

    checkpoint: a file to save to every half minute; if it exists, the run continues from it.
    """
    refuse_spans(graph, "ifr")

    def scores(run: MaskedModel, targets: Targets, saved: Saved) -> Float[Tensor, " edge"]:
        zeros = torch.zeros(run.graph.n_edges)
        total, pairs = total_over_pairs(
            lambda target_batch: (
                edge_shares(run, target_batch.batch.clean) * len(target_batch.batch)
            ),
            zeros,
            targets,
            batch_size=batch_size,
            progress=progress,
            saved=saved,
        )
        return total / pairs

    metadata = {"method": "ifr", "objective": "none"}
    return scores_of_run(
        scores,
        model,
        task,
        graph=graph,
        metadata=metadata,
        batch_size=batch_size,
        needs_targets=False,
        checkpoint=checkpoint,
    )


def edge_shares(run: MaskedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, " edge"]:
    """Each edge's share of what its destination reads, mean over positions and prompts (CPU)."""
    outputs = run.differences(tokens, run.reference("zero"))  # [source, row, d_model]
    streams = run.record(tokens)[0].streams.flatten(1, 2)  # [read, row, d_model]
    scores = torch.zeros(run.graph.n_edges)
    for read, stream in zip(run.graph.reads, streams, strict=True):
        shares = proximity(outputs[: read.n_sources], stream).mean(1)  # [source]
        scores[read.edges] = shares.repeat(read.n_destinations).cpu()
    return scores


def proximity(
    outputs: Float[Tensor, "source row d_model"], stream: Float[Tensor, "row d_model"]
) -> Float[Tensor, "source row"]:
    """Each source's share of the stream, at every row; all zero where no source comes near it."""
    size = stream.abs().sum(-1)
    closeness = torch.stack([size - (stream - output).abs().sum(-1) for output in outputs]).clamp(
        min=0
    )
    return closeness / closeness.sum(0).clamp(min=torch.finfo(closeness.dtype).tiny)
