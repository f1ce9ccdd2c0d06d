"""tmp"""

from __future__ import annotations

from typing import Any

from tl_edgeprune.hooks.prompt_checks import _check_length, _check_vocabulary
from tl_edgeprune.tasks.task import Task


def check_tokens(task: Task, model: Any) -> None:
    """Raise ValueError where a task's tokens are not in the model's vocabulary, or its prompts are
    longer than the model has positions for.
    """
    prompts = (*task.clean, *task.corrupted)
    rest = (task.answers, task.distractors, task.right, task.wrong)
    _check_vocabulary(model, [*prompts, *(t for field in rest for t in field)], _name(task))
    _check_length(model, max(map(len, prompts), default=0), _name(task))


def _name(task: Task) -> str:
    return f"task {task.name!r}"
