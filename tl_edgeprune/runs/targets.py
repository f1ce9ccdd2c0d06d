"""The full model's logits and the corrupted runs' activations, for any batch of a task's pairs.

A training run on few pairs visits each many times. Its target logits never change, nor (under
counterfactual ablation) its reference activations, so both are computed once per pair and stored.
If they take more than `max_bytes`, or the run visits fewer pairs than the task has, they are
computed for each batch instead: nothing is stored, and a step costs the same for any number of
pairs. This is decided before the first step, so that a resumed run does as the first one did.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.runs.chance_warning import ChanceWatch, callers_stack_level
from tl_edgeprune.runs.task_checks import any_task_for
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.tasks.stream import AnyTask, sample
from tl_edgeprune.tasks.task import prompts_differ

MAX_BYTES = 4 * 2**30
BAR_AFTER = 1.0  # seconds: shorter runs show no progress bar


@dataclass
class TargetBatch:
    """A batch with what to reproduce and what to replace removed edges by.

    `full`: the full model's logits; without a vocabulary if they were not asked for.
    `corrupted_logits`: those of the corrupted prompts, if they were asked for.
    """

    batch: Batch
    full: Float[Tensor, "batch read vocab"]
    reference: Reference
    corrupted_logits: Float[Tensor, "batch read vocab"] | None = None


class Targets:
    """Targets and references of a task, for batches in any composition."""

    def __init__(
        self,
        run: MaskedModel,
        task: AnyTask,
        ablation: Ablation = "counterfactual",
        *,
        batch_size: int = 16,
        max_bytes: int = MAX_BYTES,
        needs_targets: bool = True,
        progress: bool = False,
        visits: int | None = None,
        evaluating: bool = False,
    ) -> None:
        """Compute what is to be stored.

        Args:
            run: the masked model.
            task: the pairs. Means are taken over its corrupted prompts, or those of a stream's
                first chunk.
            ablation: what removed edges carry.
            batch_size: pairs per forward pass.
            max_bytes: the most memory that stored targets and references take.
            needs_targets: whether the full model's logits are needed.
            visits: how many pairs will be asked for, with repetitions; None stores the targets
                whatever memory they take.
            evaluating: whether circuits are only evaluated. Under counterfactual ablation, the
                logits of the corrupted prompts are then given too, and pairs whose two prompts are
                the same are warned of.

        Raises ValueError under counterfactual ablation if in every pair both prompts are the same,
        unless `evaluating`.
        """
        counterfactual = ablation == "counterfactual"
        if counterfactual and not prompts_differ(sample(task)):
            _report_same_prompts(task.name, evaluating)
        self.run, self.task, self.ablation = run, any_task_for(task, run.graph), ablation
        self.device = run.device
        self._gives_targets = needs_targets
        self._gives_corrupted_logits = evaluating and counterfactual
        self.watch = ChanceWatch(task.name, len(task))
        self._fixed: Reference | None = None
        if not counterfactual:
            self._fixed = run.reference(ablation, prompts=sample(task).corrupted)
        self._full: dict[int, Tensor] | None = {} if needs_targets else None
        self._references: dict[int, Reference] | None = (
            {} if self._fixed is None and max_bytes > 0 else None
        )
        if visits is not None:
            self._store_only_what_pays(visits, max_bytes)
        if self._full is not None or self._references is not None:
            self._precompute(batch_size, max_bytes, progress)

    def prepare(self, batch: Batch) -> TargetBatch:
        """The batch on the model's device, with its targets and its reference."""
        pairs, batch = batch.indices.tolist(), batch.to(self.device)
        full = self._targets(batch, pairs)
        if self._gives_corrupted_logits:
            return TargetBatch(batch, full, *self.run.record(batch.corrupted, batch.read_positions))
        return TargetBatch(batch, full, self._reference(batch, pairs))

    def _targets(self, batch: Batch, pairs: list[int]) -> Float[Tensor, "batch read vocab"]:
        if not self._gives_targets:
            return batch.read_positions.new_empty(
                (*batch.read_positions.shape, 0), dtype=torch.float32
            )
        if self._full is None:
            return self._watched_logits(batch)
        return torch.stack([self._full[i] for i in pairs])

    def _watched_logits(self, batch: Batch) -> Float[Tensor, "batch read vocab"]:
        full = full_logits(self.run, self.task, batch)
        self.watch.see(full, batch)
        return full

    def _reference(self, batch: Batch, pairs: list[int]) -> Reference:
        if self._fixed is not None:
            return self._fixed
        if self._references is None:
            return self.run.reference("counterfactual", corrupted=batch.corrupted)
        return Reference.cat([self._references[i] for i in pairs])

    def _store_only_what_pays(self, visits: int, max_bytes: int) -> None:
        """Store targets and references only if each pair is visited, and within max_bytes."""
        if visits < len(self.task):
            self._full = self._references = None
            return
        target_bytes, reference_bytes = sizes(self.run, self.task)
        if self._full is not None and target_bytes > max_bytes:
            self._full = None
        stored = target_bytes if self._full is not None else 0
        if self._references is not None and stored + reference_bytes > max_bytes:
            self._references = None

    def _precompute(self, batch_size: int, max_bytes: int, progress: bool) -> None:
        n_bytes, batches = 0, self.task.batches(batch_size)
        for batch in with_progress(batches, "full model", len(self.task), progress):
            pairs, batch = batch.indices.tolist(), batch.to(self.device)
            if self._full is not None:
                self._full |= zip(pairs, self._watched_logits(batch), strict=True)
            if self._references is not None:
                reference = self.run.reference("counterfactual", corrupted=batch.corrupted)
                n_bytes += reference.n_bytes
                if n_bytes > max_bytes:
                    self._references = None
                    continue
                rows = torch.arange(len(batch), device=self.device)
                for row, index in zip(rows.split(1), pairs, strict=True):
                    self._references[index] = reference.select(row)


def _report_same_prompts(name: str, evaluating: bool) -> None:
    """Warn, or raise ValueError unless circuits are only evaluated."""
    advice = "Give corrupted prompts with another answer, or another ablation, such as 'mean'."
    if not evaluating:
        raise ValueError(
            f"task {name!r}: in every pair both prompts are the same, so under counterfactual "
            f"ablation a removed edge carries what it carried, and no edge matters. {advice}"
        )
    warnings.warn(
        f"task {name!r}: in every pair both prompts are the same, so under counterfactual ablation "
        f"every circuit equals the full model and its measures say nothing. {advice}",
        stacklevel=callers_stack_level(),
    )


def with_progress(
    batches: Iterable[Batch], label: str, pairs: int, progress: bool, done: int = 0
) -> Iterator[Batch]:
    """The batches, under a progress bar that counts pairs (from `done` on) if they take long."""
    options = {
        "delay": BAR_AFTER,
        "unit": "pair",
        "disable": not progress,
        "leave": False,
        "initial": done,
    }
    with tqdm(total=pairs, desc=label, **options) as bar:
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
    read, positions = sum(map(len, pairs.read_positions)), sum(map(len, pairs.clean))
    return round(share * read * vocab), round(share * positions * per_position)


def full_logits(run: MaskedModel, task: AnyTask, batch: Batch) -> Float[Tensor, "batch read vocab"]:
    """The full model's logits at the batch's read positions. Raises ValueError for NaN."""
    _, full = run.record(batch.clean, batch.read_positions)
    if not bool(torch.isfinite(full).all()):
        bad = batch.indices[~torch.isfinite(full).flatten(1).all(1)].tolist()
        raise ValueError(
            f"the model gives NaN or infinite logits on pair {bad[0]} of task {task.name!r}: check "
            "its weights and dtype before looking for a circuit in it."
        )
    return full
