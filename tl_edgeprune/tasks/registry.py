"""Tasks by name. A task's file registers its builders here, where `load` and `stream` find them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from tl_edgeprune.tasks.stream import TaskStream
from tl_edgeprune.tasks.task import Task

Builder = Callable[..., Task]  # (model, n, seed, prepend_bos, *, options…)
StreamBuilder = Callable[..., TaskStream]
BUILDERS: dict[str, Builder] = {}
STREAMS: dict[str, StreamBuilder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator: make `builder(model, n, seed, prepend_bos, *, …) -> Task` known by name."""

    def add(builder: Builder) -> Builder:
        if name in BUILDERS:
            raise ValueError(f"a task called {name!r} is registered already: choose another name.")
        BUILDERS[name] = builder
        return builder

    return add


def register_stream(name: str) -> Callable[[StreamBuilder], StreamBuilder]:
    """Decorator: make `builder(model, n, seed, prepend_bos, *, …) -> TaskStream` known by name."""

    def add(builder: StreamBuilder) -> StreamBuilder:
        if name in STREAMS:
            raise ValueError(f"a stream called {name!r} is registered already: choose another.")
        STREAMS[name] = builder
        return builder

    return add


def check_options(call: str, builder: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the builder has not (its keyword-only parameters)."""
    parameters = inspect.signature(builder).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    unknown = ", ".join(option for option in options if option not in known)
    if unknown:
        has = f"its options are {', '.join(known)}" if known else "it has none"
        raise ValueError(f"{call}: no option {unknown}; {has}.")
