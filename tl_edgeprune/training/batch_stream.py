"""Batches without end: a task's pairs, epoch after epoch, from any place on.

A place is (epoch, chunk, batch): going to it makes no chunk but its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.tasks.stream import AnyTask
from tl_edgeprune.tasks.task import Task

Place = tuple[int, int, int]
START: Place = (0, 0, 0)


class Feed:
    """An iterator over shuffled batches. `place` is where it stands; `seed_of(epoch)` shuffles."""

    def __init__(
        self, task: AnyTask, size: int, seed_of: Callable[[int], int], place: Place = START
    ) -> None:
        self.task, self.size, self.seed_of = task, size, seed_of
        self.go_to(place)

    def go_to(self, place: Place) -> None:
        self.place = place
        self._batches = self._from(*place)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def _from(self, epoch: int, chunk: int, done: int) -> Iterator[Batch]:
        while True:
            for part in self._parts(epoch)[chunk:]:
                for batch in islice(part(), done, None):
                    done += 1
                    self.place = (epoch, chunk, done)
                    yield batch
                chunk, done = chunk + 1, 0
            epoch, chunk = epoch + 1, 0

    def _parts(self, epoch: int) -> list[Callable[[], Iterator[Batch]]]:
        task, seed = self.task, self.seed_of(epoch)
        if isinstance(task, Task):
            return [lambda: task.batches(self.size, True, seed)]
        return task.parts(self.size, True, seed)
