"""Files that may come from a stranger: their kind, size and depth are looked at first.

Nothing of a file is run, and no size that it declares takes memory before it has been checked.
Whatever does not fit is a ValueError that names the file (FileNotFoundError for no file, or for a
folder or a pipe in its place). Tensors are read by `tensor_files`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AnyPath = str | os.PathLike[str]
MOST_BYTES = 2**29  # of text; JSON takes some ten times its size in memory
MOST_DEPTH = 100  # of lists and tables in one another
AGAIN = ": save it again with the version that wrote it"
WRONG = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
"""What code raises that meets a value of another kind than it expects."""


def check_file(path: AnyPath, what: str) -> None:
    """Raise FileNotFoundError unless there is a regular file, which does not block its reader."""
    if not Path(path).is_file():
        hint = ": what is there is no regular file" if Path(path).exists() else ""
        raise FileNotFoundError(f"no {what} at {path}{hint}.")


def read_text(path: AnyPath, what: str, most: int = MOST_BYTES) -> str:
    """A file of UTF-8, as `check_file` wants it. Raises ValueError above so many bytes."""
    check_file(path, what)
    size = os.stat(path).st_size
    if size > most:
        raise ValueError(f"{path} is no {what}: {size:,} bytes, expected {most:,} at most.")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no {what}: it is not UTF-8 ({error}).") from None


def read_json(path: AnyPath, what: str, hint: str = "") -> Any:
    """The plain values of a file of JSON. hint: what to do about one that is none."""
    try:
        return parse_json(read_text(path, what))
    except ValueError as error:
        message = str(error)
    if not message.startswith(str(path)):
        message = f"{path} is no {what}, or a damaged one: {message}."
    raise ValueError(f"{message} {hint}".rstrip())


def parse_json(text: str) -> Any:
    """The plain values of a text. Raises ValueError for no JSON, and for more than MOST_DEPTH lists
    and tables in one another.
    """
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
    """A file's document itself. Raises ValueError unless it is a table of this kind and format.

    hint: what is no such file. again: what to do about another format.
    """
    if not isinstance(document, dict) or document.get("kind") != kind:
        raise ValueError(f"{path} is no {what}. {hint}")
    written = document.get("format")
    if written != format:
        raise ValueError(f"{path} has format {written!r:.100}, this version reads {format}{again}.")
    return document


@contextmanager
def damaged(path: AnyPath, hint: str = "") -> Iterator[None]:
    """Whatever a wrong value raises in this block is a ValueError that names the file."""
    try:
        yield
    except (RuntimeError, *WRONG) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is damaged: {first_line(error)}. {hint}".rstrip()) from None


def of_kind(value: Any, kind: type, what: str) -> Any:
    """The value itself. Raises ValueError unless it is of this very kind, which for float is any
    number.
    """
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{what} is of type {type(value).__name__}, expected {kind.__name__}")
    return value


def _inside(value: Any) -> Any:
    """What a list or a table holds."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def first_line(error: BaseException) -> str:
    """An error's first line, without its last stop."""
    line = str(error).partition("\n")[0] or type(error).__name__
    return line if len(line) < 1000 else f"{line[:1000]} …"
