"""Tasks that the model does at chance: who warns, when, and about what."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from support import model_zoo

from tl_edgeprune import Circuit, EdgeGraph, EdgePruner, discover, evaluate
from tl_edgeprune.runs.chance_warning import ChanceWatch
from tl_edgeprune.tasks.task import Task

PAIRS = 24


def task_with(model, share: float) -> Task:
    """Random pairs of which the model does this share right: answers are chosen by its logits."""
    task = model_zoo.pairs(model, PAIRS)
    with torch.no_grad():
        logits = torch.stack([model(clean[None])[0, -1] for clean in task.clean])
    order = logits.argsort(1, descending=True)
    right = torch.arange(PAIRS) < round(share * PAIRS)
    answers = torch.where(right, order[:, 0], order[:, 9])[:, None]
    others = torch.where(right, order[:, 9], order[:, 0])[:, None]
    return replace(task, name="guess", answers=list(answers), distractors=list(others))


RUNS = {
    "fit": lambda model, task: EdgePruner(50, steps=1, progress=False).fit(model, task),
    "eap": lambda model, task: discover(model, task, "eap"),
    "eap-ig": lambda model, task: discover(model, task, "eap-ig", steps=1),
    "evaluate": lambda model, task: evaluate(
        model, Circuit.from_edges(EdgeGraph.from_model(model), ["input->logits"]), task
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_task_at_chance_is_warned_of_once_at_the_callers_line(run):
    model = model_zoo.load("bridge-gpt2")
    with pytest.warns(
        UserWarning, match="at chance on task 'guess': .* on 50% of 24 prompts"
    ) as told:
        RUNS[run](model, task_with(model, 0.5))
    (one,) = [w for w in told if "at chance" in str(w.message)]
    assert one.filename == __file__ and "tasks.keep_solved" in str(one.message)


def test_a_task_that_is_done_better_is_not_warned_of():
    model = model_zoo.load("bridge-gpt2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*at chance")
        RUNS["evaluate"](model, task_with(model, 0.75))
        RUNS["evaluate"](model, task_with(model, 0.0)[:12])  # too few to say
        RUNS["evaluate"](model, replace(task_with(model, 0.0), distractors=()))  # no chance level


def test_each_pair_counts_once_and_the_first_ones_decide():
    model = model_zoo.load("bridge-gpt2")
    batch = next(task_with(model, 0.5).batches(8))
    logits = torch.zeros(len(batch), 1, model_zoo.VOCAB)
    watch = ChanceWatch("guess", 100)
    for _ in range(20):
        watch.see(logits, batch)
    assert not watch.done and len(watch.seen) == len(batch)
    sets = replace(batch, right=batch.answers, wrong=batch.distractors)
    sets = replace(sets, answers=batch.answers[:, :0], distractors=batch.answers[:, :0])
    watch = ChanceWatch("sets", 100)
    with pytest.warns(UserWarning, match="at chance on task 'sets'"):
        for first in range(0, 64, 8):
            watch.see(logits, replace(sets, indices=torch.arange(first, first + len(batch))))
    assert watch.done
