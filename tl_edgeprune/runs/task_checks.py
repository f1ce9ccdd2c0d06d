"""Whether a task fits the model and the graph: its tokens, its lengths and its spans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.prompt_checks import check_length, check_vocabulary
from tl_edgeprune.tasks.stream import AnyTask, sample
from tl_edgeprune.tasks.task import Task


def check_tokens(task: Task, model: Any) -> None:
    """Raise ValueError where a task's tokens are not in the model's vocabulary, or its prompts are
    longer than the model has positions for.
    """
    prompts = (*task.clean, *task.corrupted)
    token_sets = (task.answers, task.distractors, task.right, task.wrong)
    check_vocabulary(model, [*prompts, *(t for field in token_sets for t in field)], _name(task))
    check_length(model, max(map(len, prompts), default=0), _name(task))


def _name(task: Task) -> str:
    return f"task {task.name!r}"


POSITIONS = ("span", "position")


def check_positions(positions: str | None) -> None:
    """Raise ValueError unless it is None or one of POSITIONS."""
    if positions is not None and positions not in POSITIONS:
        raise ValueError(
            f"positions={positions!r}: expected 'span' (a mask of its own for each edge in each "
            "span of the task), 'position' (at each position) or None (the same everywhere)."
        )


def graph_at(
    model: Any, graph: EdgeGraph | None, task: AnyTask, positions: str | None
) -> EdgeGraph | None:
    """The graph (None: the model's) with edges in each span of a task, at each position, or
    (positions=None) as it is.

    Raises ValueError for a task without spans, or whose spans are named by numbers, for prompts of
    several lengths, and another word.
    """
    check_positions(positions)
    if positions is None:
        return graph
    graph = graph or EdgeGraph.from_model(model)
    if positions == "span":
        graph = graph.at(_named(sample(task)))
        if graph.by_position:
            raise ValueError(
                f"the spans of task {task.name!r} have the names of positions "
                f"({', '.join(graph.spans[:4])}): use positions='position', or give them others."
            )
        return graph
    lengths = sorted({len(tokens) for tokens in sample(task).clean})
    if len(lengths) > 1:
        raise ValueError(
            f"positions='position' needs prompts of one length, and those of task {task.name!r} "
            f"have {lengths[0]} to {lengths[-1]} tokens: take those of one length "
            "(task.subset(…)), or positions='span'."
        )
    return graph.at(map(str, range(lengths[0])))


def task_for(task: Task, graph: EdgeGraph) -> Task:
    """The task, with its spans as the graph names and orders them.

    Raises ValueError for spans that the graph has not, and prompts with more positions.
    """
    if not graph.spans:
        return task
    if graph.by_position:
        longest = max(map(len, task.clean))
        if longest > graph.n_spans:
            raise ValueError(
                f"the graph has edges at {graph.n_spans} positions, and task {task.name!r} a "
                f"prompt of {longest} tokens: take shorter prompts, or spans of the task."
            )
        spans = [torch.arange(len(tokens)) for tokens in task.clean]
        return replace(task, span_names=graph.spans, spans=spans)
    names = _named(task)
    if names == graph.spans:
        return task
    unknown = [name for name in names if name not in graph.spans]
    if unknown:
        raise ValueError(
            f"task {task.name!r} has the spans {', '.join(names)}, but the edges have masks in "
            f"{', '.join(graph.spans)} only: no {' and no '.join(unknown)}. Use a circuit found on "
            "such a task, or name the task's spans alike."
        )
    span_indices = torch.tensor([graph.spans.index(name) for name in names])
    return replace(task, span_names=graph.spans, spans=[span_indices[row] for row in task.spans])


def any_task_for(task: AnyTask, graph: EdgeGraph) -> AnyTask:
    """`task_for`, of a stream chunk by chunk."""
    if isinstance(task, Task):
        return task_for(task, graph)
    read = task.read
    return replace(task, read=lambda places: task_for(read(places), graph))


def _named(task: Task) -> tuple[str, ...]:
    """The names of a task's spans."""
    if not task.spans:
        raise ValueError(
            f"task {task.name!r} has no spans. Those of ioi, ioi-t1, greater-than, "
            "gendered-pronoun and the tracr tasks have (with a tokenizer that is not written in "
            'Python); so do JSON lines with "spans", and Task(…, span_names=…, spans=…). For '
            "prompts of one length there is positions='position'."
        )
    return task.span_names
