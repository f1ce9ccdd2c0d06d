"""EAP with integrated gradients over activations: one layer's outputs move at a time.

For the input, each layer's heads and each MLP in turn, their outputs are held on the line from
corrupted to clean, and the gradients of every destination are averaged over all of these runs.
(2 layers + 1) * steps runs a batch. Hanna et al. 2024, as in EAP-IG's code ("ig-activations").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tl_edgeprune.attribution.mask_gradient import scores_along
from tl_edgeprune.attribution.paths import Point, check_steps
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.forward_pass import HeldSources
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods.registry import register
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.targets import TargetBatch
from tl_edgeprune.tasks.task import Task


@register("eap-ig-activations", forwards_to=scores_along, gradients="steps")
def eap_ig_activations(
    model: Any,
    task: Task,
    *,
    objective: str | Objective | None = None,
    steps: int = 5,
    **settings: Any,
) -> EdgeScores:
    """Gradients with each group of sources held at 1/steps, …, 1 of the way to its clean output.

    objective: the task's own. No gradient flows into the held sources.
    """
    check_steps(steps)

    def path(run: MaskedModel, target_batch: TargetBatch) -> Iterator[Point]:
        contract = run.differences(target_batch.batch.clean, target_batch.reference)
        for sources in source_groups(run.graph):
            for step in range(1, steps + 1):
                activations = HeldSources(sources, step / steps)
                yield Point(torch.ones(run.graph.n_edges), activations, contract)

    metadata = {"method": "eap-ig-activations", "steps": steps}
    return scores_along(path, model, task, objective, metadata=metadata, **settings)


def source_groups(graph: EdgeGraph) -> list[range]:
    """Sources that are written together: the inputs, each layer's heads, each MLP."""
    groups = [range(graph.n_inputs)]
    for layer in range(graph.n_layers):
        first = graph.first_head(layer)
        groups.append(range(first, first + graph.n_heads))
        if graph.has_mlp:
            groups.append(range(first + graph.n_heads, first + graph.n_heads + 1))
    return groups
