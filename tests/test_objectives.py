"""Objectives against arithmetic on one row, and their refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import model_zoo
from torch import Tensor

from tl_edgeprune import EdgePruner, discover, faithfulness_curve
from tl_edgeprune.objectives import (
    OBJECTIVES,
    find_objective,
    has_logit_diff,
    kl,
    mean_squared_error,
    negative_log_prob,
    negative_logit_diff,
)
from tl_edgeprune.tasks import Task
from tl_edgeprune.tasks.answer_logits import logit_diff
from tl_edgeprune.tasks.batch import Batch

VOCAB = 7


def made(batch: int, read: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)
    logits, full = scale * torch.randn(2, batch, read, VOCAB, generator=generator).double()
    answers = torch.randint(VOCAB, (batch, read), generator=generator)
    positions = torch.arange(read).expand(batch, -1)
    tokens = torch.zeros(batch, read, dtype=torch.long)
    distractors = (answers + 1) % VOCAB
    return logits, full, Batch(tokens, tokens, positions, answers, distractors, torch.arange(batch))


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(x - max(row)) for x in row)) + max(row)
    return [x - total for x in row]


SHAPES = {"batch": st.integers(1, 3), "read": st.integers(1, 3), "seed": st.integers(0, 999)}


@given(**SHAPES)
def test_kl_is_its_sum_over_the_vocabulary(batch, read, seed):
    logits, full, pairs = made(batch, read, seed)
    for row, value in enumerate(kl(logits, full, pairs).tolist()):
        expected = 0.0
        for place in range(read):
            p = log_softmax(full[row, place].tolist())
            q = log_softmax(logits[row, place].tolist())
            expected += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)) / read
        assert value == pytest.approx(expected, abs=1e-10)


@given(**SHAPES)
def test_kl_is_never_below_zero_and_zero_for_the_model_itself(batch, read, seed):
    logits, full, pairs = made(batch, read, seed)
    assert bool((kl(logits, full, pairs) >= 0).all())
    assert float(kl(full + 5, full, pairs).abs().max()) < 1e-10  # a constant is no difference


@given(**SHAPES)
def test_mean_squared_error_is_its_mean(batch, read, seed):
    logits, full, pairs = made(batch, read, seed)
    for row, value in enumerate(mean_squared_error(logits, full, pairs).tolist()):
        squares = [
            (a - b) ** 2
            for a, b in zip(
                logits[row].flatten().tolist(), full[row].flatten().tolist(), strict=True
            )
        ]
        assert value == pytest.approx(sum(squares) / len(squares))


@given(batch=st.integers(1, 3), seed=st.integers(0, 999))
def test_logit_difference_is_answer_less_distractor(batch, seed):
    logits, full, pairs = made(batch, 1, seed)
    for row in range(batch):
        right, wrong = int(pairs.answers[row]), int(pairs.distractors[row])
        expected = float(logits[row, 0, right] - logits[row, 0, wrong])
        assert float(logit_diff(logits, pairs)[row]) == pytest.approx(expected)
        assert float(negative_logit_diff(logits, full, pairs)[row]) == pytest.approx(-expected)


@given(**SHAPES)
def test_log_probability_is_that_of_the_answers_tokens(batch, read, seed):
    logits, full, pairs = made(batch, read, seed)
    for row, value in enumerate(negative_log_prob(logits, full, pairs).tolist()):
        found = [
            log_softmax(logits[row, i].tolist())[int(pairs.answers[row, i])] for i in range(read)
        ]
        assert value == pytest.approx(-sum(found) / read, abs=1e-10)


def test_kl_of_extreme_logits_is_finite_in_half_precision():
    full = torch.tensor([[[6e4, -6e4, 0.0]]], dtype=torch.float16)
    logits = torch.tensor([[[-6e4, 6e4, 0.0]]], dtype=torch.float16)
    _, _, pairs = made(1, 1, 0)
    assert float(kl(logits, full, pairs)[0]) == pytest.approx(1.2e5, rel=1e-2)


# ----------------------------------------------------------------------------- choosing, refusing


def task(answers: int = 1, distractors: int = 1, objective: str = "kl") -> Task:
    prompt = torch.arange(4)
    return Task(
        "made",
        [prompt] * 3,
        [prompt] * 3,
        [torch.arange(4 - max(1, answers), 4)] * 3,
        [torch.arange(answers)] * 3,
        [torch.arange(1, 1 + distractors)] * 3,
        objective=objective,
    )


def test_the_tasks_own_objective_is_the_default():
    assert find_objective(None, task(objective="mse")) is mean_squared_error
    assert find_objective(None, task()) is kl
    assert find_objective("log-prob", task()) is negative_log_prob


def test_a_function_is_taken_as_it_is():
    def mine(logits, full, batch):
        return logits.mean((-1, -2))

    assert find_objective(mine, task()) is mine


def scalar(logits, full, batch):
    return (logits - full).square().mean()


def each_logit(logits, full, batch):
    return (logits - full).square()


def number(logits, full, batch):
    return 0.5


def without_gradient(logits, full, batch):
    return (logits.detach() - full).square().mean((-1, -2))


RUNS = {
    "fit": lambda *a, objective: EdgePruner(
        5, steps=2, init_scores=None, progress=False, objective=objective
    ).fit(*a),
    "eap": lambda *a, **own: discover(*a, method="eap", **own),
    "acdc": lambda *a, **own: discover(*a, method="acdc", threshold=0.5, **own),
    "curve": lambda model, task, objective: faithfulness_curve(
        model, discover(model, task, method="random"), task, shares=(1.0,), measure=objective
    ),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (scalar, r"objective scalar: gave a tensor of shape \(\) for 2 pairs .* \[batch\], \(2,\)"),
        (each_logit, r"each_logit: gave a tensor of shape \(2, 1, \d+\) for 2 pairs"),
        (number, "number: gave 0.5 for 2 pairs"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_objective_gives_one_number_a_pair(run, objective, message):
    model = model_zoo.load("bridge-gpt2")
    with pytest.raises(ValueError, match=message):
        RUNS[run](model, model_zoo.pairs(model, 4), objective=objective)


@pytest.mark.parametrize("run", ["fit", "eap"])
def test_an_objective_without_a_gradient_is_refused_where_it_takes_one(run):
    model = model_zoo.load("bridge-gpt2")
    with pytest.raises(ValueError, match="without_gradient: gave .batch. without a gradient"):
        RUNS[run](model, model_zoo.pairs(model, 4), objective=without_gradient)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown objective 'kld': expected one of kl, mse"
    ) as error:
        find_objective("kld", task())
    assert all(name in str(error.value) for name in OBJECTIVES)


def test_the_logit_difference_is_refused_for_answers_of_several_tokens():
    with pytest.raises(
        ValueError, match=r"pair 0 of task 'made' has 2 and 2. Use 'kl' or 'log-prob'"
    ):
        find_objective("logit-diff", task(2, 2))
    with pytest.raises(ValueError, match=r"has 1 and 0"):
        find_objective("logit-diff", task(1, 0))
    assert not has_logit_diff(task(2, 2)) and has_logit_diff(task(1, 1))


@pytest.mark.parametrize("name", ["logit-diff", "log-prob"])
def test_objectives_on_answers_are_refused_without_answers(name):
    with pytest.raises(ValueError, match=r"pair 0 of task 'made' has no answer tokens. Use 'kl'"):
        find_objective(name, task(0, 0))
