"""`--config`: an option's value from a file of YAML or TOML, where no flag gives it.

A key is the option's name without its dashes. What stands in a section named like the command is
for that command alone, and goes before what stands outside of sections. Where a flag takes
NAME=VALUE the file has a table, and any other value is read as the flag would read it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tl_edgeprune.utils.reading import read_text
from tl_edgeprune.utils.suggest import did_you_mean

NOT_IN_FILES = ("config", "help")
MOST_BYTES, MOST_VALUES = 2**20, 10_000


def take(ctx: Any, path: Path | None) -> Path | None:
    """Make the file's values the defaults of this call. `ctx`: click's context."""
    if path is None:
        return None
    commands = ctx.parent.command.commands if ctx.parent is not None else {}
    try:
        document = read(path)
        section = _section(document, str(ctx.info_name), commands)
        ctx.default_map = {**(ctx.default_map or {}), **_values(section, ctx.command.params)}
    except (ValueError, OSError) as error:
        raise typer.BadParameter(f"{path}: {' '.join(str(error).split())}") from None
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=take,
        is_eager=True,
        help="A .yaml or .toml file with any of these options; flags override the file.",
    ),
]


def read(path: Path) -> dict[str, Any]:
    """The file's table. Raises OSError for no file, and ValueError for one that is none."""
    if not path.is_file():
        raise FileNotFoundError("no such file.")
    text = read_text(path, "file of settings", MOST_BYTES)
    try:
        document = _document(path, text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check_size(document)
    return document


def _document(path: Path, text: str) -> dict[str, Any]:
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError("its name says neither YAML (.yaml, .yml) nor TOML (.toml).")
    import yaml

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {error}") from None
    if not isinstance(document, dict | None):
        raise ValueError(f"it holds a {type(document).__name__}, expected NAME: VALUE.")
    return document or {}


def _check_size(document: Any) -> None:
    """Raise ValueError above MOST_VALUES values, those that YAML repeats by a name counted as often
    as they are repeated.
    """
    stack, n_values = [document], 0
    while stack:
        value = stack.pop()
        n_values += 1
        if n_values > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        if isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            stack += value


def _section(
    document: Mapping[str, Any], command: str, commands: Collection[str]
) -> dict[str, Any]:
    """What the file says to a command: the shared keys, and over them its own section's."""

    def is_section(key: str) -> bool:
        return key in commands and isinstance(document[key], Mapping)

    shared = {key: value for key, value in document.items() if not is_section(key)}
    of_command = document[command] if command in document and is_section(command) else {}
    return {_spelt(key): value for key, value in shared.items()} | {
        _spelt(key): value for key, value in of_command.items()
    }


def _values(section: Mapping[str, Any], options: list[Any]) -> dict[str, Any]:
    """The section's values by the names of the command's parameters, written as flags are."""
    by_key = {_key(option): option for option in options}
    by_key = {key: option for key, option in by_key.items() if key not in NOT_IN_FILES}
    for key in section:
        if key not in by_key:
            hint = did_you_mean(key, by_key)
            raise ValueError(f"unknown setting {key!r}.{hint} Known: {', '.join(by_key)}.")
    return {
        by_key[key].name: _as_given(key, value, by_key[key])
        for key, value in section.items()
        if value is not None
    }


def _key(option: Any) -> str:
    """How a file calls an argument or an option: by its longest name."""
    return _spelt(max(option.opts, key=len).lstrip("-"))


def _spelt(key: Any) -> str:
    return str(key).replace("_", "-")


def _as_given(key: str, value: Any, option: Any) -> Any:
    """A value as the words that a flag would be given, which the option then reads and checks."""
    several = getattr(option, "multiple", False)
    if isinstance(value, Mapping):
        if not several:
            raise ValueError(f"{key}: expected a value, not a table.")
        return [f"{name}={_word(field)}" for name, field in value.items()]
    if isinstance(value, list):
        if not several and option.nargs == 1:
            raise ValueError(f"{key}: expected one value, not a list.")
        return [_word(item) for item in value]
    return [_word(value)] if several else _word(value)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
