"""The state of a training run on disk, and which run a checkpoint belongs to.

A checkpoint is resumed only by a run of the same settings, functions, graph, pairs and weights, so
that a resumed run gives the same bits as one that was never stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.runs import checkpoint as checkpoints
from tl_edgeprune.runs.checkpoint import SavedState, Stateful
from tl_edgeprune.runs.fingerprint import differences, of_setting, of_task
from tl_edgeprune.tasks.stream import AnyTask
from tl_edgeprune.training.batch_stream import BatchStream
from tl_edgeprune.training.result import History, history_from
from tl_edgeprune.training.settings import PrunerSettings
from tl_edgeprune.utils.reading import check_type, reporting_damage


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint has in common with the run that it resumes.

    `weights` is None if no process has all of them; they are then not compared.
    """

    shared: dict[str, Any]
    weights: str | None

    @staticmethod
    def of(
        pruner: PrunerSettings, graph: EdgeGraph, task: AnyTask, weights: str | None
    ) -> RunIdentity:
        shared = {
            "settings": json.loads(json.dumps(pruner.settings())),
            "functions": [of_setting(pruner.objective), of_setting(pruner.sampler)],
            "graph": graph.to_dict(),
            "task": of_task(task),
        }
        return RunIdentity(shared, weights)

    def state_to_resume(
        self, checkpoint: str | Path | None, resume: str | Path | None
    ) -> SavedState | None:
        """What this run continues from: `resume`, else its own checkpoint if there is one.

        The run would overwrite its own checkpoint, so that has to be of this run in either case.
        """
        resumed = None if resume is None else self.read(resume)
        if checkpoint is None or not Path(checkpoint).exists():
            return resumed
        overwritten = self.read(checkpoint)
        return overwritten if resumed is None else resumed

    def read(self, path: str | Path) -> SavedState:
        """A checkpoint of this run.

        Raises FileNotFoundError, and ValueError for a damaged checkpoint and one of another run.
        """
        saved = checkpoints.load(path)
        if "about" in saved.note:
            raise ValueError(f"checkpoint {path} is of a search, not of EdgePruner.")
        expected = self.shared
        if None not in (self.weights, saved.note.get("weights")):
            expected = expected | {"weights": self.weights}
        mismatches = [
            f"{name} is {saved_value!s:.100}, this run's {value!s:.100}"
            for name, (saved_value, value) in differences(saved.note, expected).items()
        ]
        if mismatches:
            raise ValueError(
                f"checkpoint {path} is of another run: its {'; its '.join(mismatches)}. Give "
                "another file, or remove this one to start again."
            )
        return saved


@dataclass
class TrainerState:
    """The state of a run after its last whole step."""

    identity: RunIdentity
    parts: Sequence[Stateful]  # what holds tensors: gates, rankings, constants
    optimizers: dict[str, torch.optim.Optimizer]  # by their labels in a checkpoint
    stream: BatchStream
    started: float  # time.monotonic() when this process began the run
    history: History = field(default_factory=list)
    earlier_seconds: float = 0.0  # of the processes that this run resumes

    def __post_init__(self) -> None:
        self._next_batch = self.stream.state_dict()

    def seconds(self) -> float:
        """How long the run has taken, with what it resumes."""
        return self.earlier_seconds + time.monotonic() - self.started

    def finish_step(self) -> None:
        """A resumed run continues with the batch that is next now."""
        self._next_batch = self.stream.state_dict()

    def state_dict(self) -> SavedState:
        tensors: dict[str, Tensor] = {}
        for stateful in self.parts:
            tensors |= stateful.state_dict()
        optimizers = {k: checkpoints.optimizer_state(o) for k, o in self.optimizers.items()}
        note = {"history": self.history, "seconds": self.seconds(), **self._next_batch}
        note |= {"weights": self.identity.weights, **self.identity.shared}
        return SavedState(tensors, optimizers, note)

    def load_state_dict(self, saved: SavedState) -> None:
        """Continue from a checkpoint. Raises ValueError for a damaged one."""
        with reporting_damage(saved.path, "Start the run again."):
            self.history[:] = history_from(saved.note["history"])
            self.earlier_seconds = check_type(saved.note["seconds"], float, "seconds")
            for stateful in self.parts:
                stateful.load_state_dict(saved.tensors)
            for label, optimizer in self.optimizers.items():
                checkpoints.load_optimizer_state(optimizer, saved.optimizers.get(label, {}))
            self.stream.load_state_dict(saved.note)
            self.finish_step()
