"""Writes files atomically: whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` through a temporary file beside it: no reader sees half a file.

    A link at `path` is replaced, not followed.

    Raises:
        OSError: writing failed (a full disk, a read-only folder); the old file is unchanged.
    """
    path = Path(path)
    try:
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            temporary.write_bytes(content)
            os.replace(temporary, path)
    except OSError as error:
        message = f"could not be written ({error.strerror or error}), and is as it was before"
        raise OSError(error.errno, message, str(path)) from error


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what `write_whole` leaves behind if its process is killed.

    Args:
        folder: only the process that writes in it may call this.
        name: of the file that was being written; None: any file.
    """
    for child in folder.iterdir():
        match = _TEMPORARY.fullmatch(child.name)
        if not match or name not in (None, match[1]) or not child.is_dir() or child.is_symlink():
            continue
        if [file.name for file in child.iterdir()] in ([], [match[1]]):
            (child / match[1]).unlink(missing_ok=True)
            child.rmdir()
