"""Many masks on one task: the figures of each, pair by pair.

Each batch's full run and reference are made once, then every mask costs one masked forward. Under
counterfactual ablation a mask without edges costs none: its logits are those of the corrupted
prompts, which the reference run gave.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tl_edgeprune.runs.chance_warning import ChanceWatch
from tl_edgeprune.runs.targets import Lesson, full_logits
from tl_edgeprune.runs.task_checks import check_tokens, task_for
from tl_edgeprune.tasks.task import Task, prompts_differ

Figures = Callable[[Tensor, Lesson], Mapping[str, Tensor]]
"""(logits [batch, read, vocab], lesson) -> figures by name, each [batch]."""
PairFigures = dict[str, Float[Tensor, " pair"]]


class Measured(NamedTuple):
    """One measure of the full model and of several circuits, on every pair of a task."""

    full: Float[Tensor, " pair"]
    circuits: Float[Tensor, "circuit pair"]


def sweep(
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

    `neurons`: those that the masks' runs keep.

    Raises ValueError for tokens outside the vocabulary, and where the full model gives NaN.
    """
    check_tokens(task, model)
    task = task_for(task, graph)
    full, own = _Collected(), [_Collected() for _ in masks]
    with torch.no_grad(), MaskedModel.attach(model, graph, neurons) as run:
        gates = run.gates_of(neurons)
        lessons = _lessons(run, task, ablation, batch_size)
        with tqdm(total=len(masks) * len(task), disable=not progress, leave=False) as bar:
            for lesson, nothing in lessons:
                full.add(figures(lesson.full, lesson), lesson)
                for mask, collected in zip(masks, own, strict=True):
                    logits = _logits(run, mask, lesson, nothing, gates)
                    collected.add(figures(logits, lesson), lesson)
                    bar.update(len(lesson.batch))
    return full.in_order(), [collected.in_order() for collected in own]


def measure_circuits(
    model: Any,
    graph: EdgeGraph,
    masks: Sequence[Bool[Tensor, " edge"]],
    task: Task,
    objective: Objective,
    **settings: Any,
) -> Measured:
    """Minus an objective (so that higher is better) of the full model and of each mask."""

    def figures(logits: Tensor, lesson: Lesson) -> dict[str, Tensor]:
        return {"measure": -losses(objective, logits, lesson.full, lesson.batch)}

    full, own = sweep(model, graph, masks, task, figures, **settings)
    rows = [one["measure"] for one in own]
    if not all(bool(torch.isfinite(row).all()) for row in rows):
        raise ValueError(
            f"a circuit of task {task.name!r} measures NaN or infinite: check the model's weights "
            "and dtype, or the measure."
        )
    return Measured(full["measure"], torch.stack(rows) if rows else torch.empty(0, len(task)))


def _lessons(
    run: MaskedModel, task: Task, ablation: Ablation, batch_size: int
) -> Iterator[tuple[Lesson, Tensor | None]]:
    """Each batch with what to compare with, and the logits of no edges where they are known."""
    device = run.sites.attention[0].output.device
    fixed, watch = None, ChanceWatch(task.name, len(task))
    if ablation == "counterfactual" and not prompts_differ(task):
        warnings.warn(
            f"task {task.name!r}: in every pair both prompts are the same, so under counterfactual "
            "ablation every circuit is the full model and these figures tell nothing. Give "
            "corrupted prompts with another answer, or another ablation, such as 'mean'.",
            stacklevel=5,
        )
    if ablation != "counterfactual":
        fixed = run.reference(ablation, prompts=task.corrupted)
    for batch in task.batches(batch_size):
        batch = batch.to(device)
        full = full_logits(run, task, batch)
        watch.see(full, batch)
        if fixed is not None:
            yield Lesson(batch, full, fixed), None
        else:
            reference, nothing = run.record(batch.corrupted, batch.positions)
            yield Lesson(batch, full, reference), nothing


def _logits(
    run: MaskedModel, mask: Tensor, lesson: Lesson, nothing: Tensor | None, gates: Tensor | None
) -> Tensor:
    if nothing is not None and not bool(mask.any()):
        return nothing
    batch = lesson.batch
    mask = mask.to(lesson.full.device)
    reference, positions = lesson.reference, batch.positions
    return run(batch.clean, mask, reference, positions, spans=batch.spans, neurons=gates)


class _Collected:
    """Figures of batch after batch, to be put into the task's order. They leave the model's device
    at the end, all at once: each time that they did, the CPU would wait for it.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self._pairs: list[Tensor] = []

    def add(self, figures: Mapping[str, Tensor], lesson: Lesson) -> None:
        self._pairs.append(lesson.batch.indices)
        for name, values in figures.items():
            self._parts.setdefault(name, []).append(
                values.to(torch.float64, copy=True)  # not a view of all logits
            )

    def in_order(self) -> PairFigures:
        order = torch.cat(self._pairs).argsort()
        return {name: torch.cat(parts)[order].cpu() for name, parts in self._parts.items()}
