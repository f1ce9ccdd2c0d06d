"""A method's settings from the command line, checked by the method's own annotations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tl_edgeprune.ablation.kinds import check_ablation
from tl_edgeprune.commands.common.values import check_values, known_name
from tl_edgeprune.commands.jobs.pruner_settings import build_setting
from tl_edgeprune.methods.registry import find_method


def method_settings(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """As `discover` takes them. Raises ValueError for unknown names and values of another type."""
    record = find_method(method)
    hints = {name: p.annotation for name, p in record.parameters.items() if name != "graph"}
    option = f"--set of {method}"
    values = {}
    for name, value in given.items():
        known_name(option, name, hints)
        values[name] = build_setting(name, value) if record.trained or name == "ablation" else value
        if name == "dtype" and isinstance(value, str):
            values[name] = getattr(torch, value, value)
    if "ablation" in values:
        check_ablation(values["ablation"])
    return check_values(option, values, hints)


def runs_settings(methods: Iterable[str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`compare`'s settings by method: of METHOD.NAME=VALUE, or METHOD={"NAME": VALUE}."""
    by_method: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        name, _, setting = key.partition(".")
        method = known_name("--set", name.replace("_", "-"), methods)
        by_method.setdefault(method, {})
        if not setting and not isinstance(value, Mapping):
            raise ValueError(
                f"--set {name}={value!r}: expected a setting of it, such as {name}.steps=5."
            )
        by_method[method] |= {setting: value} if setting else dict(value)
    return by_method


def compared_settings(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """As `compare` takes them: a list of thresholds is a run each, per_size a run a size."""
    fixed = {name: value for name, value in given.items() if name != "per_size"}
    several = fixed.get("threshold")
    if not isinstance(several, list):
        return method_settings(method, fixed) | _per_size(given)
    others_fixed = {name: value for name, value in fixed.items() if name != "threshold"}
    for threshold in several:
        method_settings(method, {"threshold": threshold})
    return method_settings(method, others_fixed) | {"threshold": several} | _per_size(given)


def _per_size(given: Mapping[str, Any]) -> dict[str, Any]:
    if "per_size" not in given:
        return {}
    return check_values("--set", {"per_size": given["per_size"]}, {"per_size": bool})
