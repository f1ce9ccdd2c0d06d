"""What a run depends on: with another task, function, constants or weights it is another run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support import model_zoo
from support.interrupts import stop_at_step

from tl_edgeprune import (
    Constants,
    EdgeGraph,
    EdgePruner,
    ExactBudget,
    Lagrangian,
    Task,
    discover,
    optimal_constants,
)
from tl_edgeprune.runs import resume as saved
from tl_edgeprune.runs.fingerprint import of_setting, of_task
from tl_edgeprune.tasks.answer_logits import logit_diff
from tl_edgeprune.tasks.stream import TaskStream

N = 6


@pytest.fixture(scope="module")
def model() -> Any:
    return model_zoo.load("bridge-gpt2")


@pytest.fixture(scope="module")
def task(model: Any) -> Task:
    pairs, two = model_zoo.pairs(model, N), torch.tensor([1])
    sets = {"right": [torch.tensor([1, 2])] * N, "wrong": [torch.tensor([3])] * N}
    spans = {"span_names": ("a",), "spans": [torch.zeros_like(clean) for clean in pairs.clean]}
    return dataclasses.replace(pairs, answers=[two] * N, distractors=[two + 1] * N, **sets, **spans)


CHANGES: dict[str, Any] = {
    "clean": lambda t: {"clean": t.corrupted, "corrupted": t.clean},
    "corrupted": lambda t: {"corrupted": t.clean},
    "read_positions": lambda t: {"read_positions": [p - 1 for p in t.read_positions]},
    "answers": lambda t: {"answers": t.distractors, "distractors": t.answers},
    "right": lambda t: {"right": t.wrong, "wrong": t.right},
    "objective": lambda t: {"objective": "logit-diff"},
    "spans": lambda t: {"span_names": ("b",)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_task_with_another_field_is_another(name: str, task: Task) -> None:
    other = dataclasses.replace(task, **CHANGES[name](task))
    assert of_task(other) != of_task(task) == of_task(dataclasses.replace(task))


def test_a_stream_in_other_chunks_is_another(task: Task) -> None:
    def stream(size: int) -> TaskStream:
        return TaskStream("s", N, lambda places: task.subset(list(places)), "s", chunk_size=size)

    assert of_task(stream(4)) != of_task(stream(2)) != of_task(task)


def test_settings_are_told_by_what_they_are_made_with(model: Any, tmp_path: Path) -> None:
    one, other = (lambda x: x + 1), (lambda x: x + 2)
    assert of_setting(one) != of_setting(other) and of_setting(logit_diff) == "logit_diff"
    graph = EdgeGraph.from_model(model)
    fresh = EdgeGraph.from_dict(graph.to_dict())
    assert graph.edges and of_setting(fresh) == of_setting(graph)  # whatever was asked of it before
    started, lagrangian = Lagrangian(0.5), Lagrangian(0.5)
    started.start(10, 3)
    assert of_setting(started) == of_setting(lagrangian) != of_setting(Lagrangian(0.4))
    assert of_setting({"a": (1, ExactBudget())})["a"][1]["schedule"] == "annealed"
    constants = optimal_constants(model, model_zoo.pairs(model, 2), steps=1, progress=False)
    constants.save(tmp_path / "c.safetensors")
    loaded = Constants.load(tmp_path / "c.safetensors")
    more = dataclasses.replace(constants, mlp=constants.mlp * 5)
    assert of_setting(loaded) == of_setting(constants) != of_setting(more)


def pruner(path: Path, **changes: Any) -> EdgePruner:
    settings = {"steps": 4, "batch_size": 2, "init_scores": None, "progress": False}
    return EdgePruner(20, checkpoint=path, **(settings | changes))


def test_a_run_does_not_go_on_as_another(
    model: Any, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    objective = lambda logits, full, batch: -logit_diff(logits, batch)  # noqa: E731
    with monkeypatch.context() as patch:
        stop_at_step(patch, 2)
        assert not pruner(path, objective=objective).fit(model, task).finished
    swapped = dataclasses.replace(task, **CHANGES["answers"](task))
    squared = lambda logits, full, batch: logits.square().mean((-1, -2))  # noqa: E731
    other = model_zoo.build("bridge-gpt2")
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.01)
    for what, function, on, pairs in [
        ("task", objective, model, swapped),
        ("functions", squared, model, task),
        ("weights", objective, other, task),
    ]:
        with pytest.raises(ValueError, match=f"is of another run: its {what} is"):
            pruner(path, objective=function).fit(on, pairs, resume=path)
    assert pruner(path, objective=objective).fit(model, task, resume=path).finished


def test_a_search_does_not_go_on_as_another(
    model: Any, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "SAVE_SECONDS", 0.0)
    path = tmp_path / "state.safetensors"
    constants = optimal_constants(model, task, steps=1, progress=False)
    settings: dict[str, Any] = {"checkpoint": path, "ablation": constants}
    scores = discover(model, task, "eap", **settings)
    constants.save(tmp_path / "c.safetensors")
    again = settings | {"ablation": Constants.load(tmp_path / "c.safetensors")}
    assert torch.equal(discover(model, task, "eap", **again).tensor, scores.tensor)
    more = settings | {"ablation": dataclasses.replace(constants, mlp=constants.mlp * 5)}
    swapped = dataclasses.replace(task, **CHANGES["answers"](task))
    for pairs, asked in ((task, more), (swapped, settings)):
        with pytest.raises(ValueError, match="is of another run"):
            discover(model, pairs, "eap", **asked)
