"""What cutting edges does to the objective: one mask, many candidate cuts, no gradients.

`FullCuts` is the definition, `PartialCuts` the same from partial runs. A check on a few pairs
compares the two, once per model. If a model's blocks cannot be run in parts, `find_cuts` warns and
gives the definition, which is slower.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tl_edgeprune.forward.half_blocks import BrokenHalves, reporting_broken_halves
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.self_check import model_name, once_per_model, relative, tolerance
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.targets import TargetBatch, Targets
from tl_edgeprune.search.full_cuts import FullCuts, first_pairs
from tl_edgeprune.search.partial_cuts import MAX_BYTES, PartialCuts


def find_cuts(
    run: MaskedModel,
    targets: Targets,
    loss_of: Objective,
    *,
    batch_size: int = 8,
    max_bytes: int = MAX_BYTES,
) -> FullCuts:
    """The fastest engine that this model allows, on all of the targets's pairs.

    Warns if that is whole runs: partial runs then fail, or give something else.
    """
    target_batches = [targets.prepare(batch) for batch in targets.task.batches(batch_size)]
    problem = problem_of_partial_runs(run, target_batches[0])
    if problem is None:
        return PartialCuts(run, target_batches, loss_of, max_bytes=max_bytes)
    warnings.warn(
        f"{model_name(run)}: every candidate cut is a run of the whole model, which is slow, since "
        f"partial runs {problem}.",
        stacklevel=3,
    )
    return FullCuts(run, target_batches, loss_of)


def problem_of_partial_runs(run: MaskedModel, target_batch: TargetBatch) -> str | None:
    """What is wrong with partial runs of this model, if anything is.

    Raises torch.OutOfMemoryError: it says nothing about the model.
    """
    if run.active_dropout():
        return _compare(run, target_batch)
    return once_per_model(run, f"partial runs of {run.graph}", lambda: _compare(run, target_batch))


@torch.no_grad()
def _compare(run: MaskedModel, target_batch: TargetBatch) -> str | None:
    """Compare partial with whole runs, for random cuts of some pairs' first and middle read."""
    target_batch = first_pairs(target_batch)
    expected = _logits_under_cuts(run, target_batch, FullCuts)
    try:
        with reporting_broken_halves():
            actual = _logits_under_cuts(run, target_batch, PartialCuts)
    except BrokenHalves as broken:
        return f"fail ({broken})"
    error = relative(actual, expected)
    if error <= tolerance(expected.dtype):
        return None
    return f"give logits that are off by {error:.2g} of their size"


def _logits_under_cuts(
    run: MaskedModel, target_batch: TargetBatch, engine: type[FullCuts]
) -> Tensor:
    """The logits of every run for the same random cuts, [run, pair, read, vocab]."""
    logits_of_runs: list[Tensor] = []

    def keep(logits: Tensor, full: Tensor, batch: object) -> Tensor:
        logits_of_runs.append(logits)
        return logits.new_zeros(len(logits))

    mask = torch.rand(run.graph.n_edges, generator=torch.Generator().manual_seed(0)) < 0.8
    cuts = engine(run, [target_batch], keep)
    cuts.set(mask)
    for read_index in (0, len(run.graph.reads) // 2):
        read = run.graph.reads[read_index]
        shape = (2, read.n_destinations, read.n_sources)  # [candidate, destination, source]
        generator = torch.Generator().manual_seed(read_index)
        cuts.losses(read_index, torch.rand(shape, generator=generator) < 0.5)
        cuts.commit(1)
    return torch.stack(logits_of_runs)
