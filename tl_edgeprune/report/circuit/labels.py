"""A page's texts: a circuit's title, its measures and its settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.evaluation.measures import MEASURES

Lines = dict[str, str]
_NOT_MEASURES = {"n_pairs": "pairs", "n_neurons": "neurons kept"}
_SHOWN_ELSEWHERE = ("n_edges", "n_alive", "n_edges_full", "n_wrong", "n_neurons_full")


def title_of(circuit: Circuit, sized: bool = True) -> str:
    """The title of a circuit's pictures: its task, its model and its size."""
    names = [str(circuit.metadata[k]) for k in ("task", "model") if k in circuit.metadata]
    name = " in ".join(names) or "Circuit"
    return f"{name}: {circuit.n_edges:,} edges" if sized else name


def pair_names(circuits: Sequence[Circuit]) -> tuple[str, ...]:
    """Names of two circuits in one picture: their methods if these differ, else A and B."""
    methods = tuple(str(circuit.metadata.get("method", "")) for circuit in circuits)
    return methods if all(methods) and len(set(methods)) == len(methods) else ("A", "B")


def measure_lines(measures: Any) -> Lines:
    """An Evaluation, its dictionary, or any mapping of names to values, as lines with units."""
    values = measures.to_dict() if hasattr(measures, "to_dict") else dict(measures)
    beside = {name for measure in MEASURES.values() for name in measure.derived_names}
    return {
        _label(name): _value_with_unit(name, values)
        for name, value in values.items()
        if value is not None and name not in (*beside, *_SHOWN_ELSEWHERE)
    }


def setting_lines(settings: Mapping[str, Any], prefix: str = "") -> Lines:
    """Settings as lines; nested ones are prefixed with the outer name, and None is left out."""
    lines: Lines = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines |= setting_lines(value, f"{prefix}{name}.")
        elif value is not None:
            lines[f"{prefix}{name}"] = value if isinstance(value, str) else _written(value)
    return lines


def plain(value: Any) -> float | int | str:
    """A number that JSON can hold, to six digits, otherwise its text."""
    if isinstance(value, bool | str):
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if not math.isfinite(number):
        return str(number)
    return int(number) if number.is_integer() and abs(number) < 1e15 else float(f"{number:.6g}")


def _label(name: str) -> str:
    return MEASURES[name].label if name in MEASURES else _NOT_MEASURES.get(name, name)


def _value_with_unit(name: str, values: Mapping[str, Any]) -> str:
    value, measure = values[name], MEASURES.get(name)
    if isinstance(value, str):
        return value
    error, full = values.get(f"{name}_sem"), values.get(f"{name}_full")
    if measure is None or not _is_number(value, error, full):
        return _written(value)
    text = measure.written(value)
    if measure.has_error and error is not None:
        text += f" ± {measure.written(error)}"
    if "full" in measure.ends and full is not None:
        text += f" (full {measure.written(full)})"
    return f"{text} {measure.unit}".rstrip()


def _is_number(*values: Any) -> bool:
    """Whether each value is a number that can be rounded, or missing."""
    try:
        return all(
            value is None or (type(value) is not bool and abs(value) < 1e300) for value in values
        )
    except TypeError:
        return False


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return json.dumps(value, default=str, ensure_ascii=False)
