"""Tasks by name. A task's file registers its builder; `tasks.load` finds it here."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tl_edgeprune.tasks.task import Task

Builder = Callable[[nn.Module, int, int, bool | None], Task]
BUILDERS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator: make `builder(model, n, seed, prepend_bos) -> Task` known under `name`."""

    def add(builder: Builder) -> Builder:
        if name in BUILDERS:
            raise ValueError(f"a task called {name!r} is registered already: choose another name.")
        BUILDERS[name] = builder
        return builder

    return add
