"""Prompt pairs beyond what memory holds: read or generated chunk by chunk.

1. A stream's pairs have a fixed order, cut into chunks. A chunk is a Task, created when needed and
   then dropped; any chunk can be created without the earlier ones.
2. Shuffling orders the chunks, and the pairs inside a chunk, at random. A batch has pairs of one
   chunk and of one shape.
3. So memory is that of one chunk, and the cost of a batch does not depend on the number of pairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.tasks.task import Task

CHUNK_SIZE = 1024


@dataclass(frozen=True, repr=False)
class TaskStream:
    """A task of any number of pairs, for `EdgePruner.fit`.

    Args:
        name: what the task is called in results.
        n_pairs: how many pairs there are.
        read: gives the pairs of a range of indices inside one chunk, always the same ones.
        identity: a text, equal for equal pairs in equal order; a checkpoint resumes only with
            the same one.
        objective, prepend_bos: as for a Task.
        chunk_size: pairs that are read and shuffled together.
        checks: called with each chunk; they raise ValueError for unusable pairs.

    Raises:
        ValueError: no pairs, or an empty chunk.
    """

    name: str
    n_pairs: int
    read: Callable[[range], Task]
    identity: str
    objective: str = "kl"
    prepend_bos: bool = False
    chunk_size: int = CHUNK_SIZE
    checks: tuple[Callable[[Task], Any], ...] = ()

    def __post_init__(self) -> None:
        if self.n_pairs < 1 or self.chunk_size < 1:
            raise ValueError(
                f"stream {self.name!r}: {self.n_pairs} pairs in chunks of {self.chunk_size}, "
                "expected at least one of each."
            )

    def __len__(self) -> int:
        return self.n_pairs

    def __repr__(self) -> str:
        return (
            f"TaskStream({self.name!r}, {self.n_pairs:,} pairs in {self.n_chunks:,} chunks, "
            f"objective={self.objective!r}, prepend_bos={self.prepend_bos})"
        )

    @property
    def n_chunks(self) -> int:
        return -(-self.n_pairs // self.chunk_size)

    def chunk(self, index: int) -> Task:
        """The pairs of one chunk.

        Raises:
            IndexError: no such chunk.
            ValueError: unusable pairs.
        """
        if not 0 <= index < self.n_chunks:
            raise IndexError(f"chunk {index} of {self!r}.")
        first = index * self.chunk_size
        task = self.read(range(first, min(first + self.chunk_size, self.n_pairs)))
        for check in self.checks:
            check(task)
        return task

    def check(self) -> None:
        """Read every chunk once. Raises ValueError for the first unusable pair."""
        for index in range(self.n_chunks):
            self.chunk(index)

    def batches(self, size: int, shuffle: bool = False, seed: int = 0) -> Iterator[Batch]:
        """Every pair once, in batches of at most `size` pairs of one shape (as Task.batches)."""
        for start_chunk in self.parts(size, shuffle, seed):
            yield from start_chunk()

    def parts(
        self, size: int, shuffle: bool = False, seed: int = 0
    ) -> list[Callable[[], Iterator[Batch]]]:
        """`batches` per chunk: functions that start a chunk, so that any chunk can be skipped."""
        order = list(range(self.n_chunks))
        if shuffle:
            random.Random(seed).shuffle(order)

        def part(index: int) -> Callable[[], Iterator[Batch]]:
            return lambda: self._batches(index, size, shuffle, seed + index)

        return [part(index) for index in order]

    def _batches(self, index: int, size: int, shuffle: bool, seed: int) -> Iterator[Batch]:
        first = index * self.chunk_size
        for batch in self.chunk(index).batches(size, shuffle, seed):
            yield replace(batch, indices=batch.indices + first)


AnyTask = Task | TaskStream


def check_pairs(task: AnyTask, check: Callable[[Task], Any]) -> AnyTask:
    """The task with `check` applied: to a Task now, to a stream's chunks as they are read.

    Raises:
        TypeError: neither a Task nor a TaskStream.
    """
    if not isinstance(task, Task | TaskStream):
        raise TypeError(
            f"expected a Task or a TaskStream, got {type(task).__name__}: make one with "
            "tasks.load(name, model, n=…), tasks.from_jsonl(path, model) or tasks.stream(…)."
        )
    if isinstance(task, Task):
        check(task)
        return task
    return replace(task, checks=(*task.checks, check))


def sample(task: AnyTask) -> Task:
    """The task itself, or the first chunk of a stream."""
    return task if isinstance(task, Task) else task.chunk(0)
