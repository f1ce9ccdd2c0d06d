"""What a result says of its origin, and whether a circuit's origin fits the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tl_edgeprune.circuits.metadata import several
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.modules import is_folded
from tl_edgeprune.tasks.task import Task


def origin(model: Any, task: Task, **fields: Any) -> dict[str, Any]:
    """What scores say of where they come from: model, task, objective, folding, and `fields`."""
    objective = fields.pop("objective", None) or task.objective
    name = objective if isinstance(objective, str) else getattr(objective, "__name__", "function")
    ablation = fields.pop("ablation", "counterfactual")
    return {
        "model": getattr(model.cfg, "model_name", type(model).__name__),
        "task": task.name,
        "n_pairs": len(task),
        "prepend_bos": task.prepend_bos,
        "objective": name,
        "ablation": str(ablation),
        "folded": is_folded(model),
        "d_model": int(model.cfg.d_model),
        **fields,
    }


def check_origin(
    model: Any, graph: EdgeGraph, metadata: Mapping[str, Any], what: str = "circuit"
) -> None:
    """Raise ValueError unless the graph, and where it matters the weights, are the model's."""
    actual = EdgeGraph.from_model(
        model, split_qkv=graph.split_qkv, split_embeddings=graph.split_embeddings
    ).at(graph.spans)
    if graph != actual:
        raise ValueError(
            f"the {what} is for another model: its graph is {graph}, this model's is {actual}."
        )
    kinds, folded = several(metadata, "ablation"), several(metadata, "folded")
    fixed_kinds = [kind for kind in kinds if kind != "counterfactual"]
    if fixed_kinds and folded and folded != [is_folded(model)]:
        found_on = " and one with ".join(
            "folded" if is_folded else "unfolded" for is_folded in folded
        )
        raise ValueError(
            f"the {what} was found under {' and '.join(fixed_kinds)} ablation on a model with "
            f"{found_on} norm weights, and this model's are "
            f"{'' if is_folded(model) else 'un'}folded: what an ablated source leaves differs "
            "between the two. Load the model as it was then."
        )
