"""What is measured of a run on each prompt pair, beside the full model's run.

`figures_for` chooses those that a task has the tokens for. The objectives (`objectives.py`) are
losses; these are figures as they are reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.objectives import (
    Objective,
    find_objective,
    has_logit_diff,
    has_prob_diff,
    kl,
    mean_squared_error,
    negative_log_prob,
)
from tl_edgeprune.runs.circuit_runs import Figures
from tl_edgeprune.runs.targets import Lesson
from tl_edgeprune.tasks.answer_logits import logit_diff, prob_diff
from tl_edgeprune.tasks.task import Task


def jensen_shannon(
    logits: Float[Tensor, "batch read vocab"], full: Float[Tensor, "batch read vocab"]
) -> Float[Tensor, " batch"]:
    """Jensen-Shannon divergence of two outputs, mean over read positions, nats, at most ln 2.

    (KL(p || m) + KL(q || m)) / 2 with m the mean of p and q. Lin 1991, equation 4.1.
    """
    log_p, log_q = (
        x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (full, logits)
    )
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    p_part = (log_p.exp() * (log_p - log_mean)).sum(-1)
    q_part = (log_q.exp() * (log_q - log_mean)).sum(-1)
    return ((p_part + q_part) / 2).clamp(min=0).mean(-1)


def same_top(
    logits: Float[Tensor, "batch read vocab"], full: Float[Tensor, "batch read vocab"]
) -> Bool[Tensor, " batch"]:
    """Whether the top tokens are the full model's at every read position."""
    return (logits.argmax(-1) == full.argmax(-1)).all(-1)


def figures_for(task: Task) -> Figures:
    """Every figure of a run on a batch that the task has the tokens for, each [batch].

    mse always; kl, js and exact_match but where the output is one number, of which the circuit's
    would always be the model's; logit_diff with an answer and a distractor; prob_diff with right
    and wrong tokens; accuracy with any of them; log_prob where that is the task's metric.

    Raises ValueError where the task's answers do not suffice for its metric.
    """
    find_measure(None, task)
    with_log_prob = task.metric == "log-prob"
    with_distractor, with_sets = has_logit_diff(task), has_prob_diff(task)
    with_answers = all(map(len, task.answers))

    def figures(logits: Tensor, lesson: Lesson) -> Mapping[str, Tensor]:
        batch, full = lesson.batch, lesson.full
        values = {"mse": mean_squared_error(logits, full, batch)}
        if full.shape[-1] == 1:
            return values
        values["kl"] = kl(logits, full, batch)
        values["js"] = jensen_shannon(logits, full)
        values["exact_match"] = same_top(logits, full)
        if with_distractor:
            values["logit_diff"] = logit_diff(logits, batch)
        if with_sets:
            values["prob_diff"] = prob_diff(logits, batch)
        if with_log_prob:
            values["log_prob"] = -negative_log_prob(logits, full, batch)
        if with_distractor:
            values["accuracy"] = values["logit_diff"] > 0
        elif with_answers:
            values["accuracy"] = (logits.argmax(-1) == batch.answers).all(-1)
        elif with_sets:
            values["accuracy"] = values["prob_diff"] > 0
        return values

    return figures


def find_measure(measure: str | Objective | None, task: Task) -> Objective:
    """The objective whose negative is measured; None for the task's own `metric`."""
    return find_objective(measure or task.metric, task)


def wrong_agreement(
    full_is_right: Float[Tensor, " pair"], exact_match: Float[Tensor, " pair"]
) -> float | None:
    """Share of the pairs that the full model gets wrong on which a circuit's top token is the same.

    None where it gets all of them right.
    """
    wrong = full_is_right == 0
    return float(exact_match[wrong].mean()) if bool(wrong.any()) else None


def standard_error(values: Float[Tensor, " pair"]) -> float | None:
    """Of the mean over pairs: s / sqrt(n); None for one pair."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
