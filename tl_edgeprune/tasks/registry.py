"""Tasks by name. A task's file registers its builders here, where `load` and `stream` find them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tl_edgeprune.tasks.stream import TaskStream
from tl_edgeprune.tasks.task import Task

Builder = Callable[[nn.Module, int, int, bool | None], Task]
StreamBuilder = Callable[[nn.Module, int, int, bool | None], TaskStream]
BUILDERS: dict[str, Builder] = {}
STREAMS: dict[str, StreamBuilder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator: make `builder(model, n, seed, prepend_bos) -> Task` known under `name`."""

    def add(builder: Builder) -> Builder:
        if name in BUILDERS:
            raise ValueError(f"a task called {name!r} is registered already: choose another name.")
        BUILDERS[name] = builder
        return builder

    return add


def register_stream(name: str) -> Callable[[StreamBuilder], StreamBuilder]:
    """Decorator: make `builder(model, n, seed, prepend_bos) -> TaskStream` known under `name`."""

    def add(builder: StreamBuilder) -> StreamBuilder:
        if name in STREAMS:
            raise ValueError(f"a stream called {name!r} is registered already: choose another.")
        STREAMS[name] = builder
        return builder

    return add
