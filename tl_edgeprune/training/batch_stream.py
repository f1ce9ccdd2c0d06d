"""An endless stream of a task's batches, epoch after epoch, that can start at any batch.

A cursor is (epoch, chunk, batches taken from the chunk). Moving to it loads only its own chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.tasks.stream import AnyTask
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.utils.reading import check_type

Cursor = tuple[int, int, int]
START: Cursor = (0, 0, 0)


class BatchStream:
    """An iterator over shuffled batches; `cursor` says where it is.

    Args:
        task: the pairs.
        size: pairs per batch.
        seed_of: the seed of an epoch's order.
        cursor: where to start.
    """

    def __init__(
        self, task: AnyTask, size: int, seed_of: Callable[[int], int], cursor: Cursor = START
    ) -> None:
        self.task, self.size, self.seed_of = task, size, seed_of
        self._move_to(cursor)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """The cursor as a JSON value."""
        return {"place": list(self.cursor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to a saved cursor. Raises KeyError or ValueError if it is not one."""
        cursor = check_type(state["place"], list, "place")
        epoch, chunk, n_taken = (check_type(number, int, "place") for number in cursor)
        if min(cursor) < 0 or max(cursor) > 2**53:
            raise ValueError(f"place is {cursor}")
        self._move_to((epoch, chunk, n_taken))

    def _move_to(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self._batches = self._batches_from(*cursor)

    def _batches_from(self, epoch: int, chunk: int, n_taken: int) -> Iterator[Batch]:
        while True:
            for batches_of_chunk in self._chunks(epoch)[chunk:]:
                for batch in islice(batches_of_chunk(), n_taken, None):
                    n_taken += 1
                    self.cursor = (epoch, chunk, n_taken)
                    yield batch
                chunk, n_taken = chunk + 1, 0
            epoch, chunk = epoch + 1, 0

    def _chunks(self, epoch: int) -> list[Callable[[], Iterator[Batch]]]:
        task, seed = self.task, self.seed_of(epoch)
        if isinstance(task, Task):
            return [lambda: task.batches(self.size, True, seed)]
        return task.parts(self.size, True, seed)
