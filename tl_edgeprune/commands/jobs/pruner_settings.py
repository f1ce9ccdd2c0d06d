"""EdgePruner's settings in plain words and numbers, as flags and settings.json hold them.

Objects have their fields by name, and controllers a kind: {"kind": "lagrangian", "warmup": 0.8}.
Scores and constants are files.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from tl_edgeprune.ablation.constants import Constants
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.commands.common.values import check_values, known_name
from tl_edgeprune.training.controllers import ExactBudget, Lagrangian, Penalty
from tl_edgeprune.training.pruner import EdgePruner, Optimizer
from tl_edgeprune.training.regularisers import Attachment

CONTROLLERS: dict[str, Any] = {
    "exact-budget": ExactBudget,
    "lagrangian": Lagrangian,
    "penalty": Penalty,
}
# Told by a run's inputs and its folder; a sampler is a function.
ELSEWHERE = ("seed", "dtype", "device", "checkpoint", "progress", "sampler", "self")
NAMES = tuple(n for n in inspect.signature(EdgePruner).parameters if n not in ELSEWHERE)
SAFETENSORS = ".safetensors"


def resolve_settings(given: Mapping[str, Any], *, paper: bool = False) -> dict[str, Any]:
    """Every setting: those given, over EdgePruner's own or those of `EdgePruner.paper`."""
    new, n_edges = EdgePruner.paper if paper else EdgePruner, given.get("n_edges")
    start = new(n_edges)
    if "controller" in given:  # other defaults hang on it
        controller = given["controller"]
        if isinstance(controller, Mapping):
            controller = _over(_plain(start.controller), controller)
        start = new(n_edges, controller=build_setting("controller", controller))
    settings = {name: _plain(getattr(start, name)) for name in NAMES}
    for name, value in given.items():
        if isinstance(value, Mapping):
            settings[name] = _plain(build_setting(name, _over(settings[name], value)))
        else:
            settings[name] = value
    return settings


def build_setting(name: str, value: Any) -> Any:
    """A setting as EdgePruner takes it. Raises ValueError for one that it does not take."""
    option = f"--{name.replace('_', '-')}"
    if name.endswith("controller") and isinstance(value, str | Mapping):
        return _controller(option, {"kind": value} if isinstance(value, str) else dict(value))
    if name == "optimizer" and isinstance(value, Mapping):
        return _built(option, Optimizer, value)
    if name == "attachment" and isinstance(value, int | float):
        return Attachment(value)
    if name == "init_scores" and str(value).endswith(SAFETENSORS):
        return EdgeScores.load(value)
    if name == "ablation" and str(value).endswith(SAFETENSORS):
        return Constants.load(value)
    return tuple(value) if isinstance(value, list) else value


def _over(before: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields over those of the same kind of object."""
    current = before or {"kind": "exact-budget"}
    same_kind = given.get("kind", current.get("kind")) == current.get("kind")
    return {**current, **given} if same_kind else dict(given)


def _controller(option: str, values: dict[str, Any]) -> Any:
    kind = known_name(f"{option} kind", str(values.pop("kind", "exact-budget")), CONTROLLERS)
    return _built(option, CONTROLLERS[kind], values)


def _built(option: str, cls: Any, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(cls)
    return cls(**check_values(option, values, {name: hints[name] for name in _fields(cls)}))


def _fields(cls: Any) -> list[str]:
    """Fields that are words or numbers."""
    return [
        f.name
        for f in fields(cls)
        if f.init and f.default_factory is MISSING and not callable(f.default)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Attachment):
        return value.weight
    if is_dataclass(value):
        kinds = {cls: kind for kind, cls in CONTROLLERS.items()}
        kind = {"kind": kinds[type(value)]} if type(value) in kinds else {}
        return kind | {name: _plain(getattr(value, name)) for name in _fields(type(value))}
    return list(value) if isinstance(value, tuple) else value
