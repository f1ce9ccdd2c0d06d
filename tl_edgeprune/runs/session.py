"""One opening for every run over a task's pairs: what is checked, computed and saved around it.

1. Wrong input is refused: the objective, the task's tokens, a result of another model, positions.
2. Hooks are attached to the model, with the graph at the task's spans.
3. If there is a checkpoint, the state of a stopped run is opened.
4. Targets (the full model's logits and the references) are computed when they are first used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.metadata import ablation_of
from tl_edgeprune.circuits.neurons import Neurons
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.objectives import Objective, find_objective
from tl_edgeprune.runs.provenance import check_origin, origin
from tl_edgeprune.runs.resume import Saved, saved_state
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.runs.task_checks import check_tokens, graph_at
from tl_edgeprune.tasks.task import Task


@dataclass
class Session:
    """A model with hooks attached, and what a run over a task's pairs needs beside it.

    Attributes:
        run: the masked model.
        task: the pairs, as they were given; `targets.task` has its spans as the graph has them.
        ablation: what removed edges carry.
        metadata: the origin of the run's result, as JSON values.
        saved: the state of a stopped run, and where to save this one's.
    """

    run: MaskedModel
    task: Task
    objective: str | Objective | None
    ablation: Ablation
    batch_size: int
    metadata: dict[str, Any]
    saved: Saved
    target_options: Mapping[str, Any]

    @property
    def graph(self) -> EdgeGraph:
        """The graph of the masks."""
        return self.run.graph

    @cached_property
    def loss_of(self) -> Objective:
        """The objective as a function."""
        return find_objective(self.objective, self.task)

    @cached_property
    def targets(self) -> Targets:
        """The full model's logits and the references of the task's pairs."""
        return self._targets(self.task)

    def targets_of(self, task: Task) -> Targets:
        """Likewise of other pairs, after the same checks."""
        find_objective(self.objective or self.task.objective, task)
        check_tokens(task, self.run.model)
        return self._targets(task)

    def _targets(self, task: Task) -> Targets:
        options = {"batch_size": self.batch_size, **self.target_options}
        return Targets(self.run, task, self.ablation, **options)


@contextmanager
def open_session(
    model: Any,
    task: Task,
    *,
    result: Circuit | EdgeScores | None = None,
    graph: EdgeGraph | None = None,
    positions: str | None = None,
    neurons: Neurons | Tensor | str | None = None,
    objective: str | Objective | None = None,
    needs_objective: bool = True,
    ablation: Ablation | None = None,
    batch_size: int = 8,
    metadata: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **target_options: Any,
) -> Iterator[Session]:
    """Check the input, attach hooks to the model and open what a run over the task needs.

    Args:
        result: a circuit or scores of this model that the run starts from. Its graph is the run's.
        graph: the graph of the masks without a `result`; the model's by default.
        positions: "span" or "position" for edges with a mask in each (runs/task_checks.py).
        neurons: a kind of neurons, or some of that kind, to put gates on.
        objective: the task's own by default.
        needs_objective: False for runs that never use the objective: its tokens are not checked.
        ablation: by default that of `result`, else counterfactual.
        metadata: the method and its settings, for the metadata of the run's result.
        settings: what a run must have in common with another one to continue from its checkpoint.
        checkpoint: the file that the state is saved to.
        target_options: other arguments of `Targets`, such as `max_bytes`.

    Raises ValueError for an objective or tokens that the pairs or the model do not have, a result
    of another model, spans that the task does not have, and the checkpoint of another run.
    """
    if needs_objective:
        find_objective(objective, task)
    check_tokens(task, model)
    if result is not None:
        kind = "circuit" if isinstance(result, Circuit) else "ranking"
        check_origin(model, result.graph, result.metadata, kind)
        graph = result.graph
    if ablation is None:
        ablation = ablation_of(result.metadata if result is not None else {})
    graph = graph_at(model, graph, task, positions)
    fields = {"objective": objective, "ablation": ablation, **(metadata or {})}
    about = origin(model, task, **fields)
    with (
        MaskedModel.attach(model, graph, neurons) as run,
        saved_state(checkpoint, about, dict(settings or {}), run, task) as saved,
    ):
        yield Session(run, task, objective, ablation, batch_size, about, saved, target_options)
