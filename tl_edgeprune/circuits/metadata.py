"""What a result's metadata says of its origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCORED_BY = ("ablation", "folded")  # what a circuit's figures depend on


def several(metadata: Mapping[str, Any], name: str) -> list[Any]:
    """A value of a circuit's metadata; those of all its parts where it was combined of several."""
    value = metadata.get(name)
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def ablation_of(metadata: Mapping[str, Any]) -> str:
    """The ablation that a circuit or scores were found under; counterfactual where none is told.

    Raises ValueError for a combination of circuits that were found under different ones.
    """
    kinds = several(metadata, "ablation") or ["counterfactual"]
    if len(kinds) > 1:
        raise ValueError(
            "the circuit was combined of ones that were found under different ablations "
            f"({', '.join(kinds)}), whose figures do not compare: give ablation=…."
        )
    return kinds[0]
