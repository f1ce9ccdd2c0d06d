"""Sums over all pairs of a task, batch by batch, which a stopped run can continue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from torch import Tensor

from tl_edgeprune.runs.resume import UNSAVED, Saved
from tl_edgeprune.runs.targets import Lesson, Teacher, shown
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.utils.reading import of_kind
from tl_edgeprune.utils.tensor_files import floats


def total_over_pairs(
    part: Callable[[Lesson], Tensor],
    zeros: Tensor,
    teacher: Teacher,
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
    lessons = each_lesson(
        teacher, batch_size=batch_size, max_pairs=max_pairs, progress=progress, done=n_batches
    )
    for lesson in lessons:
        total += part(lesson)
        n_batches, n_pairs = n_batches + 1, n_pairs + len(lesson.batch)
        saved.save({"total": total}, {"batches": n_batches, "pairs": n_pairs})
    return total, n_pairs


def each_lesson(
    teacher: Teacher,
    *,
    batch_size: int,
    max_pairs: int | None = None,
    progress: bool = False,
    doing: str = "scoring edges",
    done: int = 0,
) -> Iterator[Lesson]:
    """Every pair once, batch by batch, with targets and references, after the first `done` batches.

    `max_pairs`: about this many pairs at most, drawn at random.
    """
    batches = teacher.task.batches(batch_size, shuffle=max_pairs is not None)
    if max_pairs is not None:
        batches = _enough(batches, max_pairs)
    n_done = sum(len(batch) for batch in islice(batches, done))
    n_pairs = min(len(teacher.task), max_pairs or len(teacher.task))
    for batch in shown(batches, doing, n_pairs, progress, n_done):
        yield teacher.lesson(batch)


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
        n_batches, n_pairs = (of_kind(values[name], int, name) for name in ("batches", "pairs"))
        if not 0 < n_batches <= n_pairs:
            raise ValueError(f"it says {n_batches} batches of {n_pairs} pairs")
    return total, n_batches, n_pairs
