"""A page's texts: a circuit's title, its measures and its settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tl_edgeprune.circuits.circuit import Circuit

Lines = dict[str, str]
_SKIPPED = {  # told elsewhere, or beside another figure
    *("kl_sem", "logit_diff_full", "logit_diff_empty", "prob_diff_full", "prob_diff_empty"),
    *("n_edges", "n_alive", "n_edges_full", "n_wrong", "n_neurons_full", "kl_empty", "mse_empty"),
}


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
    figures = measures.to_dict() if hasattr(measures, "to_dict") else dict(measures)
    return {
        _label(name): _figure(name, figures)
        for name, value in figures.items()
        if value is not None and name not in _SKIPPED
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
    return {
        "n_pairs": "pairs",
        "n_neurons": "neurons kept",
        "kl": "KL to the full model",
        "js": "Jensen–Shannon",
        "mse": "mean squared error",
        "exact_match": "exact match",
        "wrong_agreement": "wrong as the model",
        "logit_diff": "logit difference",
        "prob_diff": "probability difference",
        "recovered": "logit difference kept",
    }.get(name, name)


def _figure(name: str, figures: Mapping[str, Any]) -> str:
    value = figures[name]
    if isinstance(value, str):
        return value
    if not _is_number(value, *(figures.get(f"{name}_{of}") for of in ("sem", "full"))):
        return _written(value)
    if name in ("exact_match", "accuracy", "wrong_agreement", "recovered"):
        return f"{100 * value:.1f} %"
    if name in ("kl", "js"):
        error = figures.get(f"{name}_sem")
        return f"{value:.3f}{'' if error is None else f' ± {error:.3f}'} nats"
    if name in ("logit_diff", "prob_diff"):
        full = figures.get(f"{name}_full")
        return f"{value:.2f}" + ("" if full is None else f" (full {full:.2f})")
    return _written(value)


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
