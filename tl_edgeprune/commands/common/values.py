"""NAME=VALUE on the command line: numbers, words and JSON, checked by what takes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tl_edgeprune.utils.suggest import did_you_mean


def parse_assignments(option: str, texts: Iterable[str]) -> dict[str, Any]:
    """The values by name: JSON where it is JSON, else the text. Raises ValueError without "="."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{option} {text!r}: expected NAME=VALUE.")
        values[name.strip().replace("-", "_")] = word(value)
    return values


def word(text: str) -> Any:
    """JSON where it is JSON, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def known_name(option: str, name: str, known: Iterable[str]) -> str:
    """The name. Raises ValueError, with the nearest, for one that is not known."""
    names = list(known)
    if name in names:
        return name
    expected = f"expected one of {', '.join(names)}" if names else "it has no settings"
    raise ValueError(f"{option}: unknown name {name!r}, {expected}.{did_you_mean(name, names)}")


def check_values(
    option: str, values: Mapping[str, Any], hints: Mapping[str, Any]
) -> dict[str, Any]:
    """The values, lists as tuples. Raises ValueError for an unknown name, and for a value of
    another type than its hint says.
    """
    from beartype import BeartypeConf
    from beartype.door import is_bearable

    tower = BeartypeConf(is_pep484_tower=True)  # a whole number is a number
    checked_values = {}
    for name, value in values.items():
        hint = hints[known_name(option, name, hints)]
        checked_values[name] = tuple(value) if isinstance(value, list) else value
        if not is_bearable(checked_values[name], hint, conf=tower):
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{option} {name}={json.dumps(value)}: expected {expected}.")
    return checked_values


def whole_path(given: str | None) -> str | None:
    """A file's whole path, so that resume finds it from anywhere; a name as it is."""
    if given is None or not given.endswith(".safetensors"):
        return given
    return str(Path(given).resolve())
