"""Locks: only one process works in a folder, or on a file, at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tl_edgeprune.utils.writing import clear_leftovers


@contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes out of the folder; the same thread may hold it twice.

    Args:
        folder: is created if it does not exist.

    Raises:
        BlockingIOError: another process works in it.
        FileExistsError: it is a file.
        OSError: nothing can be written in it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder.")
    with _locked(folder / ".lock", f"another process works in {folder}", "folder"):
        clear_leftovers(folder)
        yield


@contextmanager
def locked_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from a file that this one writes repeatedly. Raises as `held` does."""
    path = Path(path)
    with _locked(path.with_name(f".{path.name}.lock"), f"another run writes {path}", "path"):
        clear_leftovers(path.parent, path.name)
        yield


@contextmanager
def _locked(lock: Path, busy: str, argument: str) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock = lock.parent.resolve() / lock.name
    if lock.is_symlink() or (lock.exists() and not lock.is_file()):
        raise FileExistsError(f"{lock} is not this program's lock file: remove it.")
    file_lock = FileLock(lock, timeout=0, is_singleton=True)
    try:
        file_lock.acquire()
    except Timeout:
        raise BlockingIOError(f"{busy}: wait for it to end, or give another {argument}.") from None
    try:
        yield
    finally:
        file_lock.release()
