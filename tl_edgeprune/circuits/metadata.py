"""What a result's metadata says of its origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCORED_BY = ("ablation", "folded")  # what a circuit's measures depend on


def values_in_metadata(metadata: Mapping[str, Any], name: str) -> list[Any]:
    """The metadata value as a list; a combined circuit lists the values of its parts."""
    value = metadata.get(name)
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def ablation_of(metadata: Mapping[str, Any]) -> str:
    """The ablation that a circuit or scores were found under; counterfactual if none is recorded.

    Raises:
        ValueError: the circuit combines circuits that were found under different ablations.
    """
    kinds = values_in_metadata(metadata, "ablation") or ["counterfactual"]
    if len(kinds) > 1:
        raise ValueError(
            "the circuit combines circuits that were found under different ablations "
            f"({', '.join(kinds)}), whose results are not comparable: give ablation=…."
        )
    return kinds[0]
