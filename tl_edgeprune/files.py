"""Files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` by way of a temporary neighbour, so no reader sees half a file."""
    path = Path(path)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        temporary.write_bytes(content)
        os.replace(temporary, path)
