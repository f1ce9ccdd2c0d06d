"""Suggests a known name for an unknown one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean …?" with the most similar known name; "" if none is similar."""
    matches = get_close_matches(str(name), [*known], 1)
    return f" Did you mean {matches[0]}?" if matches else ""
