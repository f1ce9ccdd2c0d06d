"""The full model's answers and the corrupted runs' activations, computed once per example.

A training run visits each example many times. Its target logits never change, nor (under
counterfactual ablation) its reference activations, so both are kept, batch by batch put together
from the examples that it wants. Activations are dropped where they would take more than
`max_bytes`; they are then recorded anew for each batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation import Reference
from tl_edgeprune.constants import Ablation
from tl_edgeprune.masked import MaskedModel
from tl_edgeprune.tasks.task import Batch, Task

MAX_BYTES = 4 * 2**30


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
        task: Task,
        ablation: Ablation = "counterfactual",
        *,
        batch_size: int = 16,
        max_bytes: int = MAX_BYTES,
        bias_in_heads: bool = False,
        targets: bool = True,
        progress: bool = False,
    ) -> None:
        """`targets`: whether the full model's answers are wanted at all."""
        self.run, self.task, self.ablation = run, task, ablation
        self.device = run.sites.attention[0].output.device
        self._full: dict[int, Tensor] = {}
        self._targeted = targets
        self._references: dict[int, Reference] | None = {} if max_bytes > 0 else None
        self._fixed: Reference | None = None
        if ablation != "counterfactual":
            self._fixed = run.reference(
                ablation, prompts=task.corrupted, bias_in_heads=bias_in_heads
            )
        if targets or (self._fixed is None and self._references is not None):
            self._precompute(batch_size, max_bytes, progress)

    def lesson(self, batch: Batch) -> Lesson:
        """The batch on the model's device, with its targets and its reference."""
        batch = batch.to(self.device)
        indices = batch.indices.tolist()
        full = batch.positions.new_empty((*batch.positions.shape, 0), dtype=torch.float32)
        if self._targeted:
            full = torch.stack([self._full[i] for i in indices])
        return Lesson(batch, full, self._reference(batch, indices))

    def _reference(self, batch: Batch, indices: list[int]) -> Reference:
        if self._fixed is not None:
            return self._fixed
        if self._references is None:
            return self.run.reference("counterfactual", corrupted=batch.corrupted)
        return Reference.cat([self._references[i] for i in indices])

    def _precompute(self, batch_size: int, max_bytes: int, progress: bool) -> None:
        kept, batches = 0, list(self.task.batches(batch_size))
        for batch in tqdm(batches, "full model", disable=not progress, leave=False):
            batch = batch.to(self.device)
            if self._targeted:
                targets = full_logits(self.run, self.task, batch)
                self._full |= zip(batch.indices.tolist(), targets, strict=True)
            if self._fixed is None and self._references is not None:
                reference = self.run.reference("counterfactual", corrupted=batch.corrupted)
                kept += reference.n_bytes
                if kept > max_bytes:
                    self._references = None
                    continue
                rows = torch.arange(len(batch), device=self.device)
                for row, index in zip(rows.split(1), batch.indices.tolist(), strict=True):
                    self._references[index] = reference.select(row)


def full_logits(run: MaskedModel, task: Task, batch: Batch) -> Float[Tensor, "batch read vocab"]:
    """The full model's logits at the batch's read positions. Raises ValueError for NaN."""
    _, full = run.record(batch.clean, batch.positions)
    if not bool(torch.isfinite(full).all()):
        bad = batch.indices[~torch.isfinite(full).flatten(1).all(1)].tolist()
        raise ValueError(
            f"the model gives NaN or infinite logits on pair {bad[0]} of task {task.name!r}: check "
            "its weights and dtype before looking for a circuit in it."
        )
    return full


def check_vocabulary(task: Task, vocab: int) -> None:
    """Raise ValueError where a task's tokens are not in the model's vocabulary."""
    fields = (task.clean, task.corrupted, task.answers, task.distractors, task.right, task.wrong)
    largest = max(int(tokens.max()) for field in fields for tokens in field if len(tokens))
    if largest >= vocab:
        raise ValueError(
            f"task {task.name!r} has token {largest}, but the model knows 0 to {vocab - 1}."
        )
