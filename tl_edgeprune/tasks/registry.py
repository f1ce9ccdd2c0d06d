"""Tasks by name: their files register builders here for `load` and `stream`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tl_edgeprune.tasks.stream import TaskStream
from tl_edgeprune.tasks.task import Task

Builder = Callable[..., Task]  # (model, n, seed, prepend_bos, *, options…)
StreamBuilder = Callable[..., TaskStream]
Made = TypeVar("Made", bound=Callable[..., Any])
BUILDERS: dict[str, Builder] = {}
STREAMS: dict[str, StreamBuilder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator: make `builder(model, n, seed, prepend_bos, *, …) -> Task` known by name."""
    return _adding(BUILDERS, "task", name)


def register_stream(name: str) -> Callable[[StreamBuilder], StreamBuilder]:
    """Decorator: make `builder(model, n, seed, prepend_bos, *, …) -> TaskStream` known by name."""
    return _adding(STREAMS, "stream", name)


def _adding(table: dict[str, Made], kind: str, name: str) -> Callable[[Made], Made]:
    def add(builder: Made) -> Made:
        if name in table:
            raise ValueError(
                f"a {kind} called {name!r} is already registered: choose another name."
            )
        table[name] = builder
        return builder

    return add


def check_model_sizes(name: str, model: Any, sizes: Mapping[str, int]) -> None:
    """Raise ValueError unless the model's cfg has the sizes that a shipped model's task needs."""
    for size, expected in sizes.items():
        actual = getattr(getattr(model, "cfg", None), size, None)
        if actual != expected:
            raise ValueError(
                f"tasks.load({name!r}): the model has {size}={actual}, the task is for "
                f"{size}={expected}: use models.load({name!r})."
            )


def check_options(call: str, builder: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that is not a keyword-only parameter of the builder."""
    parameters = inspect.signature(builder).parameters.values()
    option_names = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    unknown = ", ".join(option for option in options if option not in option_names)
    if unknown:
        has = f"its options are {', '.join(option_names)}" if option_names else "it has none"
        raise ValueError(f"{call}: no option {unknown}; {has}.")
