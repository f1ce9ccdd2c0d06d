"""Prompt pairs streamed from a JSON-lines file of any size (jsonl.py describes the format).

1. Opening scans the file once, line by line: it checks each line's JSON and split, and keeps only
   the offset at which each chunk begins.
2. Reading a chunk seeks to its offset, then reads and encodes its lines.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from tl_edgeprune.tasks.jsonl import encode_pair, record_of, task_of
from tl_edgeprune.tasks.stream import CHUNK_SIZE, TaskStream
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.tasks.tokens import resolve_prepend_bos, tokenizer_of
from tl_edgeprune.utils.reading import check_file

MOST_BYTES = 2**24  # of a line, which is held in memory


class Mark(NamedTuple):
    """Where a chunk begins: its first byte, and the number of its first line."""

    byte: int
    line: int


class Index(NamedTuple):
    """The result of scanning a file."""

    marks: list[Mark]
    n_pairs: int
    digest: str


def stream_jsonl(
    path: str | Path,
    model: nn.Module,
    *,
    prepend_bos: bool | None = None,
    split: str | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> TaskStream:
    """A stream of the pairs in a file.

    Errors in a line's texts surface when its chunk is read: `stream.check()` reads all of them.

    Args:
        path, model, prepend_bos, split: as for `from_jsonl`.
        chunk_size: pairs per chunk.

    Raises:
        ValueError: with file and line, no JSON object or a missing key; no pairs of this split.
            While reading: the file has changed, or a line that `from_jsonl` refuses.
    """
    path = Path(path)
    check_file(path, "file of prompt pairs")
    tokenizer, prepend_bos = tokenizer_of(model), resolve_prepend_bos(model, prepend_bos)
    opened = _stamp(path)
    index = _index(path, split, chunk_size)

    def read(indices: range) -> Task:
        if _stamp(path) != opened:
            raise ValueError(f"{path} has changed since it was opened: open the stream again.")
        chunk, first_in_chunk = divmod(indices.start, chunk_size)
        mark = index.marks[chunk]
        with path.open("rb") as file:
            file.seek(mark.byte)
            pairs = []
            records = _records(path, file, split, mark)
            for number, record in islice(records, first_in_chunk, first_in_chunk + len(indices)):
                with _naming_line(path, number):
                    pairs.append(encode_pair(record, tokenizer, prepend_bos))
        return task_of(path.stem, pairs, prepend_bos, str(path))

    identity = repr((index.digest, split, prepend_bos, len(tokenizer)))
    return TaskStream(
        path.stem,
        index.n_pairs,
        read,
        identity=identity,
        prepend_bos=prepend_bos,
        chunk_size=chunk_size,
    )


def _index(path: Path, split: str | None, chunk_size: int) -> Index:
    marks: list[Mark] = []
    splits: set[Any] = set()
    digest, n_pairs = hashlib.sha256(), 0
    with path.open("rb") as file:
        for mark, record in _all_records(path, file, Mark(0, 1), digest):
            splits.add(record.get("split"))
            if _is_in_split(record, split):
                if n_pairs % chunk_size == 0:
                    marks.append(mark)
                n_pairs += 1
    if not n_pairs:
        names = ", ".join(sorted(map(str, splits))) or "none"
        raise ValueError(f"{path}: no prompt pairs for split={split!r}; splits found: {names}.")
    return Index(marks, n_pairs, digest.hexdigest()[:16])


def _records(
    path: Path, file: Any, split: str | None, start: Mark
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The split's records from a mark onwards, with their line numbers."""
    for mark, record in _all_records(path, file, start):
        if _is_in_split(record, split):
            yield mark.line, record


def _all_records(
    path: Path, file: Any, start: Mark, digest: Any = None
) -> Iterator[tuple[Mark, dict[str, Any]]]:
    byte = start.byte
    lines = iter(lambda: file.readline(MOST_BYTES), b"")
    for number, line in enumerate(lines, start=start.line):
        if len(line) == MOST_BYTES:
            raise ValueError(
                f"{path}, line {number}: {MOST_BYTES:,} bytes or more, expected fewer."
            )
        if digest is not None:
            digest.update(line)
        if line.strip():
            with _naming_line(path, number):
                record = record_of(line.decode("utf-8"))
            yield Mark(byte, number), record
        byte += len(line)


def _is_in_split(record: dict[str, Any], split: str | None) -> bool:
    return split is None or record.get("split") in (None, split)


@contextmanager
def _naming_line(path: Path, number: int) -> Iterator[None]:
    """Errors in this context name the file and the line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
