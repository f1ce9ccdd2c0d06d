"""EAP with GradDrop: attribution that one layer's cancelling gradient cannot hide.

EAP's gradient is taken once for each layer, with nothing flowing back through that layer's heads
and MLP; the score is the mean of the magnitudes, over layers - 1 (an edge into the dropped layer
gets nothing there). Kramár et al. 2024, "AtP*", section 3.2. Magnitudes are taken batch by batch;
batch_size=1 takes them pair by pair, as published.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tl_edgeprune.attribution.mask_gradient import differentiable_at_one, scores_along
from tl_edgeprune.attribution.paths import Point
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.forward_pass import HeldSources
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.methods.registry import register
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.targets import TargetBatch
from tl_edgeprune.tasks.task import Task


@register("eap-graddrop", forwards_to=scores_along, gradients=1)
def eap_graddrop(
    model: Any, task: Task, *, objective: str | Objective | None = None, **settings: Any
) -> EdgeScores:
    """Magnitudes of EAP's scores, averaged over dropping each layer's gradient (>= 0).

    objective: as for EAP.
    """
    objective = differentiable_at_one(objective, task, "EAP with GradDrop")
    scores = scores_along(
        dropped_layers,
        model,
        task,
        objective,
        metadata={"method": "eap-graddrop"},
        magnitudes=True,
        **settings,
    )
    layers = scores.graph.n_layers
    return replace(scores, tensor=scores.tensor * layers / max(1, layers - 1))


def dropped_layers(run: MaskedModel, target_batch: TargetBatch) -> Iterator[Point]:
    """The full model, each layer's sources held at what they are in turn."""
    graph = run.graph
    for layer in range(graph.n_layers):
        first = graph.first_head(layer)
        heads = HeldSources(range(first, first + graph.sources_per_layer), 1.0)
        yield Point(torch.ones(graph.n_edges), heads)
