"""Sums over all of a task's pairs, batch by batch, that a stopped run goes on with."""

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
    """The sum of what `part` gives for every batch, from `zeros` on, and how many pairs it is of.

    `max_pairs`: no more than about so many pairs, drawn at random. `saved`: where it goes on.
    """
    total, batches, pairs = _before(saved, zeros)
    lessons = each_lesson(
        teacher, batch_size=batch_size, max_pairs=max_pairs, progress=progress, done=batches
    )
    for lesson in lessons:
        total += part(lesson)
        batches, pairs = batches + 1, pairs + len(lesson.batch)
        saved.save({"total": total}, {"batches": batches, "pairs": pairs})
    return total, pairs


def each_lesson(
    teacher: Teacher,
    *,
    batch_size: int,
    max_pairs: int | None = None,
    progress: bool = False,
    doing: str = "scoring edges",
    done: int = 0,
) -> Iterator[Lesson]:
    """Every pair once, batch by batch, with targets and references, but for the first `done`
    batches.

    `max_pairs`: no more than about so many pairs, drawn at random.
    """
    batches = teacher.task.batches(batch_size, shuffle=max_pairs is not None)
    if max_pairs is not None:
        batches = _enough(batches, max_pairs)
    n_done = sum(len(batch) for batch in islice(batches, done))
    n_pairs = min(len(teacher.task), max_pairs or len(teacher.task))
    for batch in shown(batches, doing, n_pairs, progress, n_done):
        yield teacher.lesson(batch)


def _enough(batches: Iterator[Batch], pairs: int) -> Iterator[Batch]:
    """Batches until they hold so many pairs: the last one of a length may be small."""
    for batch in batches:
        yield batch
        pairs -= len(batch)
        if pairs <= 0:
            return


def _before(saved: Saved, zeros: Tensor) -> tuple[Tensor, int, int]:
    """The sum so far, of so many batches and pairs."""
    state = saved.load()
    if state is None:
        return zeros, 0, 0
    with saved.damaged():
        total = floats(state[0], "total", tuple(zeros.shape)).to(zeros)
        batches, pairs = (of_kind(state[1][name], int, name) for name in ("batches", "pairs"))
        if not 0 < batches <= pairs:
            raise ValueError(f"it says {batches} batches of {pairs} pairs")
    return total, batches, pairs
