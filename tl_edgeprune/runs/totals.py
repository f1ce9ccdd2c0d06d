"""Sums over all pairs of a task, batch by batch, which a stopped run can continue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from torch import Tensor

from tl_edgeprune.runs.resume import UNSAVED, Saved
from tl_edgeprune.runs.targets import TargetBatch, Targets, with_progress
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.utils.reading import check_type
from tl_edgeprune.utils.tensor_files import floats


def total_over_pairs(
    part: Callable[[TargetBatch], Tensor],
    zeros: Tensor,
    targets: Targets,
    *,
    batch_size: int,
    max_pairs: int | None = None,
    progress: bool = False,
    saved: Saved = UNSAVED,
) -> tuple[Tensor, int]:
    """The sum of `part` over all batches, and the number of their pairs.

    Args:
        part: the term of a batch.
        zeros: where the sum starts.
        max_pairs: use about this many pairs at most, drawn at random.
        saved: the state to continue from and to save.
    """
    total, n_batches, n_pairs = _saved_total(saved, zeros)
    target_batches = each_target_batch(
        targets, batch_size=batch_size, max_pairs=max_pairs, progress=progress, done=n_batches
    )
    for target_batch in target_batches:
        total += part(target_batch)
        n_batches, n_pairs = n_batches + 1, n_pairs + len(target_batch.batch)
        saved.save({"total": total}, {"batches": n_batches, "pairs": n_pairs})
    return total, n_pairs


def each_target_batch(
    targets: Targets,
    *,
    batch_size: int,
    max_pairs: int | None = None,
    progress: bool = False,
    doing: str = "scoring edges",
    done: int = 0,
) -> Iterator[TargetBatch]:
    """Every pair once, batch by batch, with targets and references, after the first `done` batches.

    `max_pairs`: about this many pairs at most, drawn at random.
    """
    batches = targets.task.batches(batch_size, shuffle=max_pairs is not None)
    if max_pairs is not None:
        batches = _enough(batches, max_pairs)
    n_done = sum(len(batch) for batch in islice(batches, done))
    n_pairs = min(len(targets.task), max_pairs or len(targets.task))
    for batch in with_progress(batches, doing, n_pairs, progress, n_done):
        yield targets.prepare(batch)


def _enough(batches: Iterator[Batch], pairs: int) -> Iterator[Batch]:
    """Batches until they hold this many pairs: the last one of a length may be small."""
    for batch in batches:
        yield batch
        pairs -= len(batch)
        if pairs <= 0:
            return


def _saved_total(saved: Saved, zeros: Tensor) -> tuple[Tensor, int, int]:
    """The sum so far, and the numbers of its batches and pairs."""
    state = saved.load()
    if state is None:
        return zeros, 0, 0
    tensors, values = state
    with saved.damaged():
        total = floats(tensors, "total", tuple(zeros.shape)).to(zeros)
        n_batches, n_pairs = (check_type(values[name], int, name) for name in ("batches", "pairs"))
        if not 0 < n_batches <= n_pairs:
            raise ValueError(f"it says {n_batches} batches of {n_pairs} pairs")
    return total, n_batches, n_pairs
