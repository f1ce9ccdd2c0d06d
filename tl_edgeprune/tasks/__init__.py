"""Tasks: prompt pairs on which circuits are found and evaluated.

tasks.load("ioi", model, n=256)              # built for the model's own tokenizer
tasks.keep_solved(model, task)               # the prompts that the model solves
tasks.from_jsonl("pairs.jsonl", model)       # your own pairs, as text
tasks.from_pandas(frame, model)              # the same from a table, or from_hf_dataset
tasks.stream("ioi", model, n=100_000)        # generated or read chunk by chunk
tasks.stream_jsonl("pairs.jsonl", model)
Task(name, clean, corrupted, read_positions) # your own pairs, as token ids
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tl_edgeprune.tasks import library, semi_synthetic  # noqa: F401 (they register their tasks)
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.tasks.jsonl import from_jsonl
from tl_edgeprune.tasks.jsonl_stream import stream_jsonl
from tl_edgeprune.tasks.recipe import register_recipe
from tl_edgeprune.tasks.registry import (
    BUILDERS,
    STREAMS,
    check_options,
    register,
    register_stream,
)
from tl_edgeprune.tasks.solved import keep_solved, solved
from tl_edgeprune.tasks.stream import TaskStream
from tl_edgeprune.tasks.tables import from_hf_dataset, from_pandas
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.utils.suggest import did_you_mean

__all__ = [
    "Batch",
    "Task",
    "TaskStream",
    "from_hf_dataset",
    "from_jsonl",
    "from_pandas",
    "keep_solved",
    "list",
    "load",
    "register",
    "register_recipe",
    "register_stream",
    "solved",
    "stream",
    "stream_jsonl",
]


def list() -> tuple[str, ...]:
    """Names that `load` knows."""
    return tuple(sorted(BUILDERS))


def load(
    name: str,
    model: nn.Module,
    n: int,
    seed: int = 0,
    *,
    prepend_bos: bool | None = None,
    **options: Any,
) -> Task:
    """A task of `n` prompt pairs for this model; equal seeds give equal pairs.

    Args:
        name: one of `tasks.list()`.
        model: its tokenizer writes the prompts.
        n: how many pairs.
        seed: of the random choice of pairs.
        prepend_bos: None means as the model's tokenizer does by default.
        options: of this task, such as `form` of "boolean-expressions".

    Raises:
        ValueError: unknown name or option; `n` below 1 or above the number of possible pairs; a
            model without the tokenizer or the vocabulary that the task needs.
    """
    builder = _checked_builder("load", "task", BUILDERS, name, n, options)
    return builder(model, n, seed, prepend_bos, **options)


def stream(
    name: str,
    model: nn.Module,
    n: int,
    seed: int = 0,
    *,
    prepend_bos: bool | None = None,
    **options: Any,
) -> TaskStream:
    """`n` prompt pairs, generated chunk by chunk: for any number of pairs.

    Takes the arguments of `load`. Equal seeds give equal pairs, but not those of `load`.

    Raises:
        ValueError: as `load` does, or a task that has no stream.
    """
    builder = _checked_builder("stream", "stream", STREAMS, name, n, options)
    return builder(model, n, seed, prepend_bos, **options)


def _checked_builder(
    function: str, kind: str, builders: dict[str, Any], name: str, n: int, options: dict[str, Any]
) -> Any:
    """The builder of this name, for a call of tasks.`function` with valid arguments."""
    if name not in builders:
        raise ValueError(
            f"tasks.{function}({name!r}): no such {kind}; there are "
            f"{', '.join(sorted(builders))}.{did_you_mean(name, builders)}"
        )
    if n < 1:
        raise ValueError(f"tasks.{function}({name!r}, n={n}): a {kind} needs at least one pair.")
    check_options(f"tasks.{function}({name!r})", builders[name], options)
    return builders[name]
