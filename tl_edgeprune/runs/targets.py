"""The full model's answers and the corrupted runs' activations, for any batch of a task's pairs.

A training run on few pairs visits each many times. Its target logits never change, nor (under
counterfactual ablation) its reference activations, so both are computed once per pair and kept.
Where they would take more than `max_bytes`, or the run visits fewer pairs than the task has, they
are computed anew for each batch: nothing is then kept, and a step costs the same for any number of
pairs. What is kept is settled before the first step, so that a resumed run does as the first did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.runs.chance_warning import ChanceWatch
from tl_edgeprune.runs.task_checks import any_task_for
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.tasks.stream import AnyTask, sample
from tl_edgeprune.tasks.task import prompts_differ

MAX_BYTES = 4 * 2**30
BAR_AFTER = 1.0  # seconds: what is done sooner shows no progress


@dataclass
class Lesson:
    """A batch with what to reproduce and what to replace removed edges by.

    `full` has no vocabulary where the teacher was told to leave targets out.
    """

    batch: Batch
    full: Float[Tensor, "batch read vocab"]
    reference: Reference


class Teacher:
    """Targets and references of a task, for batches in any composition."""

    def __init__(
        self,
        run: MaskedModel,
        task: AnyTask,
        ablation: Ablation = "counterfactual",
        *,
        batch_size: int = 16,
        max_bytes: int = MAX_BYTES,
        targets: bool = True,
        progress: bool = False,
        visits: int | None = None,
    ) -> None:
        """`targets`: whether the full model's answers are wanted at all. `visits`: how many pairs
        will be asked for, repeated ones counted again; None keeps the targets whatever they take.

        Means are taken over the corrupted prompts of the task, or of a stream's first chunk. Raises
        ValueError where nothing is to be found: no pair's prompts differ, under counterfactual
        ablation.
        """
        if ablation == "counterfactual" and not prompts_differ(sample(task)):
            raise ValueError(
                f"task {task.name!r}: in every pair both prompts are the same, so under "
                "counterfactual ablation a removed edge carries what it carried, and none matters. "
                "Give corrupted prompts with another answer, or another ablation, such as 'mean'."
            )
        self.run, self.task, self.ablation = run, any_task_for(task, run.graph), ablation
        self.device = run.sites.attention[0].output.device
        self._targeted = targets
        self.watch = ChanceWatch(task.name, len(task))
        self._fixed: Reference | None = None
        if ablation != "counterfactual":
            self._fixed = run.reference(ablation, prompts=sample(task).corrupted)
        self._full: dict[int, Tensor] | None = {} if targets else None
        self._references: dict[int, Reference] | None = (
            {} if self._fixed is None and max_bytes > 0 else None
        )
        if visits is not None:
            self._drop_what_does_not_pay(visits, max_bytes)
        if self._full is not None or self._references is not None:
            self._precompute(batch_size, max_bytes, progress)

    def lesson(self, batch: Batch) -> Lesson:
        """The batch on the model's device, with its targets and its reference."""
        pairs, batch = batch.indices.tolist(), batch.to(self.device)
        return Lesson(batch, self._targets(batch, pairs), self._reference(batch, pairs))

    def _targets(self, batch: Batch, pairs: list[int]) -> Float[Tensor, "batch read vocab"]:
        if not self._targeted:
            return batch.positions.new_empty((*batch.positions.shape, 0), dtype=torch.float32)
        if self._full is None:
            return self._watched(batch)
        return torch.stack([self._full[i] for i in pairs])

    def _watched(self, batch: Batch) -> Float[Tensor, "batch read vocab"]:
        full = full_logits(self.run, self.task, batch)
        self.watch.see(full, batch)
        return full

    def _reference(self, batch: Batch, pairs: list[int]) -> Reference:
        if self._fixed is not None:
            return self._fixed
        if self._references is None:
            return self.run.reference("counterfactual", corrupted=batch.corrupted)
        return Reference.cat([self._references[i] for i in pairs])

    def _drop_what_does_not_pay(self, visits: int, max_bytes: int) -> None:
        """Keep targets and references only where each pair is visited, and in max_bytes."""
        if visits < len(self.task):
            self._full = self._references = None
            return
        targets, references = sizes(self.run, self.task)
        if self._full is not None and targets > max_bytes:
            self._full = None
        kept = targets if self._full is not None else 0
        if self._references is not None and kept + references > max_bytes:
            self._references = None

    def _precompute(self, batch_size: int, max_bytes: int, progress: bool) -> None:
        kept, batches = 0, self.task.batches(batch_size)
        for batch in shown(batches, "full model", len(self.task), progress):
            pairs, batch = batch.indices.tolist(), batch.to(self.device)
            if self._full is not None:
                self._full |= zip(pairs, self._watched(batch), strict=True)
            if self._references is not None:
                reference = self.run.reference("counterfactual", corrupted=batch.corrupted)
                kept += reference.n_bytes
                if kept > max_bytes:
                    self._references = None
                    continue
                rows = torch.arange(len(batch), device=self.device)
                for row, index in zip(rows.split(1), pairs, strict=True):
                    self._references[index] = reference.select(row)


def shown(
    batches: Iterable[Batch], label: str, pairs: int, progress: bool, done: int = 0
) -> Iterator[Batch]:
    """The batches, under a progress bar that counts pairs, from `done` on, if they take long."""
    how = {
        "delay": BAR_AFTER,
        "unit": "pair",
        "disable": not progress,
        "leave": False,
        "initial": done,
    }
    with tqdm(total=pairs, desc=label, **how) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def sizes(run: MaskedModel, task: AnyTask) -> tuple[int, int]:
    """Bytes of all pairs' targets, and of all their references (a stream's by its first chunk)."""
    cfg, graph, weight = run.model.cfg, run.graph, run.sites.attention[0].output
    heads, d_head, d_model = weight.shape
    streams = graph.n_inputs + len(run.sites.mlp) + len(graph.reads)
    hidden = math.prod(run.neuron_shape) if run.sites.hidden else 0
    per_position = streams * d_model + graph.n_layers * heads * d_head + hidden
    vocab = int(getattr(cfg, "d_vocab_out", None) or cfg.d_vocab)
    pairs = sample(task)
    share = len(task) / len(pairs) * weight.element_size()
    read, positions = sum(map(len, pairs.positions)), sum(map(len, pairs.clean))
    return round(share * read * vocab), round(share * positions * per_position)


def full_logits(run: MaskedModel, task: AnyTask, batch: Batch) -> Float[Tensor, "batch read vocab"]:
    """The full model's logits at the batch's read positions. Raises ValueError for NaN."""
    _, full = run.record(batch.clean, batch.positions)
    if not bool(torch.isfinite(full).all()):
        bad = batch.indices[~torch.isfinite(full).flatten(1).all(1)].tolist()
        raise ValueError(
            f"the model gives NaN or infinite logits on pair {bad[0]} of task {task.name!r}: check "
            "its weights and dtype before looking for a circuit in it."
        )
    return full
