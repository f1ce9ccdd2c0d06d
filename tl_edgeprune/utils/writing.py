"""Files written whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` by way of a temporary neighbour, so no reader sees half a file.

    A link at `path` is replaced, and not followed. Raises OSError, of the kind that stopped it (a
    full disk, a read-only folder), with the path; what was there is then as it was.
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
    """Remove what `write_whole` leaves of the file (of any) when its process is killed.

    Only for the one process that writes there.
    """
    for child in folder.iterdir():
        of = _TEMPORARY.fullmatch(child.name)
        if not of or name not in (None, of[1]) or not child.is_dir() or child.is_symlink():
            continue
        if [file.name for file in child.iterdir()] in ([], [of[1]]):
            (child / of[1]).unlink(missing_ok=True)
            child.rmdir()
