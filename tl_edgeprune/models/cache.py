"""Cached folders of files that are built once and verified at every use.

1. A folder is built under a temporary name and then renamed, so nobody sees half of one.
2. A manifest inside records the sha256 of every file and what the files were made from.
3. The manifest is verified before use; a folder that fails is built again.
4. One lock per folder: of two processes that need it, one builds and the other waits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

MANIFEST = "manifest.json"
Build = Callable[[Path], None]


def cache_root() -> Path:
    """Where converted models are kept: $TL_EDGEPRUNE_CACHE, else ~/.cache/tl_edgeprune."""
    return Path(os.environ.get("TL_EDGEPRUNE_CACHE") or "~/.cache/tl_edgeprune").expanduser()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, recipe: dict[str, str]) -> str | None:
    """What is wrong with a cached folder, in words; None if it is intact.

    Args:
        folder: the cached folder.
        recipe: what the files should have been made from, as it was given to `ensure`.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_from, digests = manifest["recipe"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error!r})"
    if made_from != recipe:
        return f"it was made from {made_from}, not from {recipe}"
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256(file) != digest:
            return f"the sha256 of {name} is not the one recorded when it was written"
    return None


def ensure(folder: Path, recipe: dict[str, str], build: Build) -> Path:
    """The cached folder, built first if it is missing, or (with a warning) damaged.

    Args:
        folder: its path.
        recipe: what the files are made from (source digest, format version), for the manifest.
        build: writes the files into the empty folder that it is given; if it raises, nothing is
            left behind.
    """
    if folder.is_dir() and damage(folder, recipe) is None:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        problem = damage(folder, recipe) if folder.is_dir() else None
        if folder.is_dir() and problem is None:  # another process built it while we waited
            return folder
        if problem is not None:
            message = f"cached model {folder} is damaged: {problem}. It is built again."
            warnings.warn(message, stacklevel=2)
        _build_beside(folder, recipe, build)
    return folder


def _build_beside(folder: Path, recipe: dict[str, str], build: Build) -> None:
    for leftover in folder.parent.glob(f"{folder.name}.*/"):  # by a build that was killed
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        build(temporary)
        digests = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        manifest = json.dumps({"recipe": recipe, "files": digests}, indent=2)
        (temporary / MANIFEST).write_text(manifest, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
