"""Many masks on one task: the measures of each, pair by pair.

Each batch's full run and reference are computed once, then every mask costs one masked forward.
Under counterfactual ablation a mask without edges costs none: its logits are those of the corrupted
prompts, which the reference run gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.neurons import Neurons
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.objectives import Objective, losses
from tl_edgeprune.runs.session import open_session
from tl_edgeprune.runs.targets import TargetBatch
from tl_edgeprune.tasks.task import Task

Figures = Callable[[Tensor, TargetBatch], Mapping[str, Tensor]]
"""(logits [batch, read, vocab], target_batch) -> figures by name, each [batch]."""
PairFigures = dict[str, Float[Tensor, " pair"]]


class PerPair(NamedTuple):
    """One measure of the full model and of several circuits, on every pair of a task."""

    full: Float[Tensor, " pair"]
    circuits: Float[Tensor, "circuit pair"]


def run_circuits(
    model: Any,
    graph: EdgeGraph,
    masks: Sequence[Bool[Tensor, " edge"]],
    task: Task,
    figures: Figures,
    *,
    ablation: Ablation = "counterfactual",
    batch_size: int = 16,
    progress: bool = False,
    neurons: Neurons | None = None,
) -> tuple[PairFigures, list[PairFigures]]:
    """The figures of the full model and of each mask, in the task's order of pairs (float64, CPU).

    Args:
        figures: what is measured on a batch.
        ablation: what removed edges carry.
        batch_size: pairs per forward pass.
        neurons: those that the masks' runs keep.

    Raises ValueError for tokens outside the vocabulary, and if the full model gives NaN.
    """
    of_full, of_masks = _Collected(), [_Collected() for _ in masks]
    with (
        torch.no_grad(),
        open_session(
            model,
            task,
            graph=graph,
            neurons=neurons,
            needs_objective=False,
            ablation=ablation,
            batch_size=batch_size,
            visits=0,
            evaluating=True,
        ) as session,
    ):
        run, targets = session.run, session.targets
        gates = run.gates_of(neurons)
        with tqdm(total=len(masks) * len(task), disable=not progress, leave=False) as bar:
            for batch in targets.task.batches(batch_size):
                target_batch = targets.prepare(batch)
                of_full.add(figures(target_batch.full, target_batch), target_batch)
                for mask, of_mask in zip(masks, of_masks, strict=True):
                    logits = _logits(run, mask, target_batch, gates)
                    of_mask.add(figures(logits, target_batch), target_batch)
                    bar.update(len(batch))
    return of_full.in_order(), [of_mask.in_order() for of_mask in of_masks]


def measure_circuits(
    model: Any,
    graph: EdgeGraph,
    masks: Sequence[Bool[Tensor, " edge"]],
    task: Task,
    objective: Objective,
    **settings: Any,
) -> PerPair:
    """Minus an objective (so that higher is better) of the full model and of each mask."""

    def figures(logits: Tensor, target_batch: TargetBatch) -> dict[str, Tensor]:
        return {"measure": -losses(objective, logits, target_batch.full, target_batch.batch)}

    of_full, of_masks = run_circuits(model, graph, masks, task, figures, **settings)
    rows = [of_mask["measure"] for of_mask in of_masks]
    if not all(bool(torch.isfinite(row).all()) for row in rows):
        raise ValueError(
            f"a circuit of task {task.name!r} measures NaN or infinite: check the model's weights "
            "and dtype, or the measure."
        )
    return PerPair(of_full["measure"], torch.stack(rows) if rows else torch.empty(0, len(task)))


def _logits(
    run: MaskedModel, mask: Tensor, target_batch: TargetBatch, gates: Tensor | None
) -> Tensor:
    if target_batch.corrupted_logits is not None and not bool(mask.any()):
        return target_batch.corrupted_logits
    return run.logits(target_batch, mask.to(run.device), neurons=gates)


class _Collected:
    """Figures of batch after batch, to be put into the task's order.

    They stay on the model's device until the end: each transfer would make the CPU wait for it.
    """

    def __init__(self) -> None:
        self._batches: dict[str, list[Tensor]] = {}
        self._indices: list[Tensor] = []

    def add(self, figures: Mapping[str, Tensor], target_batch: TargetBatch) -> None:
        self._indices.append(target_batch.batch.indices)
        for name, values in figures.items():
            self._batches.setdefault(name, []).append(
                values.to(torch.float64, copy=True)  # not a view of all logits
            )

    def in_order(self) -> PairFigures:
        order = torch.cat(self._indices).argsort()
        return {name: torch.cat(values)[order].cpu() for name, values in self._batches.items()}
