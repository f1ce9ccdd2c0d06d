"""Reads untrusted files: type, size and nesting are checked before parsing.

No code in a file is run, and no size that it declares allocates memory before it is checked. A
wrong file is a ValueError that names it; a missing one, or a folder or a pipe in its place, is a
FileNotFoundError. `tensor_files` reads tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AnyPath = str | os.PathLike[str]
MOST_BYTES = 2**29  # of text; parsed JSON takes about ten times as much memory
MOST_DEPTH = 100  # of nested lists and tables
AGAIN = ": save it again with the version that wrote it"
WRONG = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
"""What code raises if a value has an unexpected type."""


def check_file(path: AnyPath, what: str) -> None:
    """Raise FileNotFoundError unless `path` is a regular file, which cannot block its reader."""
    if not Path(path).is_file():
        hint = ": it is not a regular file" if Path(path).exists() else ""
        raise FileNotFoundError(f"no {what} at {path}{hint}.")


def read_text(path: AnyPath, what: str, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file. Raises ValueError if it has more than `most` bytes."""
    check_file(path, what)
    size = os.stat(path).st_size
    if size > most:
        raise ValueError(f"{path} is no {what}: {size:,} bytes, expected {most:,} at most.")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no {what}: it is not UTF-8 ({error}).") from None


def read_json(path: AnyPath, what: str, hint: str = "") -> Any:
    """The values of a JSON file. hint: what to do if it is not one."""
    try:
        return parse_json(read_text(path, what))
    except ValueError as error:
        message = str(error)
    if not message.startswith(str(path)):
        message = f"{path} is no {what}, or a damaged one: {message}."
    raise ValueError(f"{message} {hint}".rstrip())


def parse_json(text: str) -> Any:
    """The values of a JSON text. Raises ValueError if it is not JSON or nested too deep."""
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    level = [document]
    for _ in range(MOST_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return document
    raise ValueError("nested too deep")


def of_format(
    document: Any, path: AnyPath, what: str, *, kind: str, format: int, hint: str, again: str = ""
) -> dict[str, Any]:
    """The document, if it is of this kind and format.

    Args:
        document: the parsed file.
        path: of the file, for errors.
        what: the type of file, for errors.
        kind, format: what the document's "kind" and "format" must be.
        hint: which file was expected.
        again: what to do about another format.

    Raises:
        ValueError: another kind or format.
    """
    if not isinstance(document, dict) or document.get("kind") != kind:
        raise ValueError(f"{path} is no {what}. {hint}")
    written = document.get("format")
    if written != format:
        raise ValueError(f"{path} has format {written!r:.100}, this version reads {format}{again}.")
    return document


@contextmanager
def reporting_damage(path: AnyPath, hint: str = "") -> Iterator[None]:
    """Turn errors that a wrong value raises in this block into a ValueError with the path."""
    try:
        yield
    except (RuntimeError, *WRONG) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is damaged: {first_line(error)}. {hint}".rstrip()) from None


def check_type(value: Any, kind: type, what: str) -> Any:
    """The value, if it is of exactly this type (an int passes as a float); else ValueError."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{what} is of type {type(value).__name__}, expected {kind.__name__}")
    return value


def _inside(value: Any) -> Any:
    """The values inside a list or a table."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def first_line(error: BaseException) -> str:
    """The first line of an error, at most 1,000 characters."""
    line = str(error).partition("\n")[0] or type(error).__name__
    return line if len(line) < 1000 else f"{line[:1000]} …"
