"""One process at work in a folder, or on a file: a second one is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tl_edgeprune.utils.writing import clear_leftovers


@contextmanager
def held(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes out of the folder, which is made; the same thread may hold it twice.

    Raises BlockingIOError where another one works in it, FileExistsError where it is a file, and
    OSError, with its name, where nothing can be written in it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder.")
    with _locked(folder / ".lock", f"another process works in {folder}", "folder"):
        clear_leftovers(folder)
        yield


@contextmanager
def held_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from a file that this one writes again and again. Raises as `held`."""
    path = Path(path)
    with _locked(path.with_name(f".{path.name}.lock"), f"another run writes {path}", "path"):
        clear_leftovers(path.parent, path.name)
        yield


@contextmanager
def _locked(lock: Path, busy: str, other: str) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock = lock.parent.resolve() / lock.name
    if lock.is_symlink() or (lock.exists() and not lock.is_file()):
        raise FileExistsError(f"{lock} is no file of this program's: remove it.")
    file_lock = FileLock(lock, timeout=0, is_singleton=True)
    try:
        file_lock.acquire()
    except Timeout:
        raise BlockingIOError(f"{busy}: wait for it to end, or give another {other}.") from None
    try:
        yield
    finally:
        file_lock.release()
