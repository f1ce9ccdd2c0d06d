"""What a run depends on as JSON values, equal for equal runs, so that its files are its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import CodeType
from typing import Any

from torch import Tensor

from tl_edgeprune.ablation.constants import Constants
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.modules import all_parameters
from tl_edgeprune.hooks.shards import is_sharded
from tl_edgeprune.tasks.stream import AnyTask, TaskStream
from tl_edgeprune.tasks.task import PAIR_FIELDS, SET_FIELDS


def digest(value: Any) -> str:
    """A short name for JSON values, equal for equal values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def differences(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What of a run's own identity another's note has otherwise, by name: theirs and the own.

    Of settings and other mappings, those entries alone that differ ("settings.steps").
    """
    different: dict[str, tuple[Any, Any]] = {}
    for name, value in own.items():
        their_value = theirs.get(name)
        if isinstance(value, Mapping) and isinstance(their_value, Mapping):
            with_missing = {**dict.fromkeys(their_value), **value}
            different |= {
                f"{name}.{k}": pair for k, pair in differences(their_value, with_missing).items()
            }
        elif their_value != value:
            different[name] = their_value, value
    return different


def of_task(task: AnyTask) -> str:
    """Equal for equal pairs in equal order, which are read and judged alike."""
    how = [task.objective, task.prepend_bos]
    if isinstance(task, TaskStream):
        return digest([task.identity, task.n_pairs, task.chunk_size, *how])
    names = (*PAIR_FIELDS, *SET_FIELDS, "spans")
    tokens = [[pair.tolist() for pair in getattr(task, name)] for name in names]
    return digest([tokens, list(task.span_names), *how])


def of_weights(model: Any) -> str | None:
    """Of up to 16 values of each parameter, exactly: another fine-tuning is another model.

    None for weights that several processes share out, of which none has all.
    """
    if is_sharded(model):
        return None
    values = []
    for parameter in all_parameters(model):
        if hasattr(parameter, "to_local"):
            return None
        flat = parameter.detach().flatten()
        values.append(flat[:: max(1, len(flat) // 16)][:16].double().tolist())
    return digest(values)


def of_setting(value: Any) -> Any:
    """A setting. Of objects, what they were made with; of a function, its name and its code."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Tensor):
        return {"tensor": digest(value.detach().cpu().double().tolist())}
    if isinstance(value, EdgeGraph):
        return {"kind": "EdgeGraph", **value.to_dict()}
    if isinstance(value, EdgeScores):
        parts = [of_setting(value.graph), of_setting(value.tensor), value.by_magnitude]
        return {"kind": "EdgeScores", "digest": digest(parts)}
    if isinstance(value, Constants):
        parts = [of_setting(tensor) for tensor in (value.inputs, value.z, value.mlp)]
        return {"kind": "Constants", "digest": digest(parts)}
    if isinstance(value, Mapping):
        return {str(key): of_setting(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [of_setting(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        made_with = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        keywords = {n: of_setting(v) for n, v in made_with.items() if not isinstance(v, Tensor)}
        return {"kind": type(value).__name__, **keywords}
    return _of_function(value) if callable(value) else str(value)


def _of_function(function: Any) -> str:
    name = getattr(function, "__name__", None) or repr(function)
    code = getattr(function, "__code__", None)
    of_package = str(getattr(function, "__module__", "")).startswith("tl_edgeprune.")
    return name if code is None or of_package else f"{name} {digest(_of_code(code))}"


def _of_code(code: CodeType) -> list[Any]:
    constants = [_of_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]
