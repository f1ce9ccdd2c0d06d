"""The nearest of the names that are known, for a name that is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question with the nearest, to follow an error that lists them all; "" if none is near."""
    matches = get_close_matches(str(name), [*known], 1)
    return f" Did you mean {matches[0]}?" if matches else ""
