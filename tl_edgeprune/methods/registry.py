"""Discovery methods by name: `discover(model, task, method="eap")`.

A method is one record, made in its own file: `@register("eap", gradients=1)`. What `discover`,
`compare` and the command line need to know of a method is read from its record.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.tasks.stream import AnyTask, TaskStream
from tl_edgeprune.utils.suggest import did_you_mean

Found = EdgeScores | Circuit
Function = TypeVar("Function", bound=Callable[..., Found])


@dataclass(eq=False)
class Method:
    """A discovery method. Calling it calls its function: `METHODS["eap"](model, task, **settings)`.

    name: of the method. function: (model, task, *, settings…) -> EdgeScores or Circuit. The other
    fields are the arguments of `register`.
    """

    name: str
    function: Callable[..., Found]
    forwards_to: Callable[..., Any] | None = None
    fixed: tuple[str, ...] = ()
    trained: bool = False
    gives_circuit: bool = False
    gradients: int | str | None = None

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.function)

    def __call__(self, model: Any, task: AnyTask, **settings: Any) -> Found:
        return self.function(model, task, **settings)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The settings that the method takes, with annotations and defaults."""
        own = inspect.signature(self.function, eval_str=True).parameters
        settings = {n: p for n, p in own.items() if n not in ("model", "task")}
        named = {n: p for n, p in settings.items() if p.kind is not p.VAR_KEYWORD}
        if len(named) == len(settings) or self.forwards_to is None:
            return named
        further = inspect.signature(self.forwards_to, eval_str=True).parameters
        return named | {
            name: parameter
            for name, parameter in further.items()
            if name not in (*named, *self.fixed)
            and parameter.kind is parameter.KEYWORD_ONLY
            and parameter.default is not parameter.empty
        }

    @property
    def required(self) -> list[str]:
        """Names of the settings that have no default."""
        return [name for name, p in self.parameters.items() if p.default is p.empty]

    def with_checkpoint(self, file: Path, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings, with `checkpoint=file` if the method can save its state and resume."""
        return ({"checkpoint": file} if "checkpoint" in self.parameters else {}) | settings


METHODS: dict[str, Method] = {}


def register(
    name: str,
    *,
    forwards_to: Callable[..., Any] | None = None,
    fixed: tuple[str, ...] = (),
    trained: bool = False,
    gives_circuit: bool = False,
    gradients: int | str | None = None,
) -> Callable[[Function], Function]:
    """Decorator: make `function(model, task, *, settings…)` a method that `discover` knows by name.

    Args:
        name: what `discover(…, method=name)` and `tl-edgeprune discover --method` take.
        forwards_to: what the function hands its `**settings` to, whose keyword-only settings are
            then the method's too.
        fixed: settings of `forwards_to` that the method chooses itself and does not take.
        trained: it is trained by EdgePruner: it takes a TaskStream too, and values as
            `tl-edgeprune prune` does.
        gives_circuit: it chooses the size and gives a Circuit; the others score all edges.
        gradients: forward and backward passes per batch, for --dry-run: a number, or the name of
            the setting that holds it; None if they are not known beforehand.

    Raises ValueError if the name is taken.
    """

    def add(function: Function) -> Function:
        if name in METHODS:
            raise ValueError(
                f"a method called {name!r} is registered already: choose another name."
            )
        METHODS[name] = Method(
            name, function, forwards_to, fixed, trained, gives_circuit, gradients
        )
        return function

    return add


def find_method(name: str) -> Method:
    """The method of this name. Raises ValueError, with the nearest name, if there is none."""
    if name not in METHODS:
        raise ValueError(
            f"unknown method {name!r}: expected one of {', '.join(METHODS)}."
            f"{did_you_mean(name, METHODS)}"
        )
    return METHODS[name]


def discover(model: Any, task: AnyTask, method: str = "edge-pruning", **settings: Any) -> Found:
    """Score every edge of a model for a task; a method that chooses the size gives a circuit.

    Args:
        method: a name in `METHODS`.
        settings: the method's own.

    Raises:
        ValueError: an unknown method, a setting that it does not take, or one that it requires and
            did not get; and as the method raises it.
        TypeError: a stream of pairs, for a method that takes a Task only.
    """
    chosen = find_method(method)
    if isinstance(task, TaskStream) and not chosen.trained:
        raise TypeError(
            f"{method} takes a Task, got a TaskStream: give some of its pairs, such as "
            "stream.chunk(0)."
        )
    known = chosen.parameters
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(
            f"{method} takes no {' and no '.join(unknown)}: expected some of {', '.join(known)}."
        )
    missing = [name for name in chosen.required if name not in settings]
    if missing:
        raise ValueError(
            f"{method} needs {' and '.join(missing)}: give discover(…, {method!r}, "
            f"{', '.join(f'{name}=…' for name in missing)})."
        )
    return chosen(model, task, **settings)
