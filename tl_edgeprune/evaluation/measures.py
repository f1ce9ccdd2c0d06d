"""What is measured of a run on each prompt pair, compared with the full model's run.

A measure is one record: its name, its label, its format, its function. `evaluate`, `compare`, the
pages and the pictures are made from the records. The objectives (`objectives.py`) are losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.utils.lazy import late  # so that a page of a circuit needs no TransformerLens

PairFunction = Callable[[Tensor, Tensor, Any], Tensor]
"""(logits, full logits [batch, read, vocab], batch) -> values [batch]."""

_has_logit_diff, _has_prob_diff, _kl, _mean_squared_error, _negative_log_prob = (
    late("tl_edgeprune.objectives", name)
    for name in (
        "has_logit_diff",
        "has_prob_diff",
        "kl",
        "mean_squared_error",
        "negative_log_prob",
    )
)
_logit_diff, _prob_diff = (
    late("tl_edgeprune.tasks.answer_logits", name) for name in ("logit_diff", "prob_diff")
)


@dataclass(frozen=True)
class Measure:
    """A measure of a circuit: the mean of a function over a task's pairs.

    Args:
        name: its name in `Evaluation` and in tables.
        label: what pages and pictures call it.
        heading: what the text of an Evaluation calls it; "" leaves it out there.
        for_task: gives the function of a pair for a task, None if the task lacks the tokens. None
            for a measure that is computed from others.
        format: of its values, as in Python's format; "%" for shares.
        unit: of its values, such as "nats".
        column: the format of its column in `compare`'s table; None for no column.
        ends: "full" and "empty" to measure it of the full model and of no edges too.
        has_error: whether its standard error over pairs is known as `name_sem`.
        is_distance: whether it is 0 for the full model, and above 0 otherwise.
        of_numbers: whether it exists if the model's output is one number.
        unless: the text leaves it out if one of these measures is known.
        note: what the text adds to it; `{n_wrong}` is replaced by that value.
        reported: whether results hold it.
    """

    name: str
    label: str
    heading: str = ""
    for_task: Callable[[Any], PairFunction | None] | None = None
    format: str = ".3f"
    unit: str = ""
    column: str | None = None
    ends: tuple[str, ...] = ()
    has_error: bool = False
    is_distance: bool = False
    of_numbers: bool = False
    unless: tuple[str, ...] = ()
    note: str = ""
    reported: bool = True

    def written(self, value: float | int) -> str:
        """A value as text, without its unit."""
        if self.format.endswith("%"):
            return f"{100 * value:{self.format[:-1]}f} %"
        return f"{value:z{self.format}}"

    @property
    def derived_names(self) -> list[str]:
        """Names of what belongs to it: at both ends, and its error."""
        return [f"{self.name}_{end}" for end in self.ends] + [f"{self.name}_sem"] * self.has_error


MEASURES: dict[str, Measure] = {}


def register(
    name: str,
    label: str,
    *,
    applies: Callable[[Any], bool] = lambda task: True,
    format: str = ".3f",
    unit: str = "",
    column: str | None = ".3g",
    ends: tuple[str, ...] = (),
) -> Callable[[PairFunction], PairFunction]:
    """Decorator: make `function(logits, full, batch) -> values [batch]` a measure by name.

    It then shows in `evaluate`'s result (`evaluation.name`) and its text, in `compare`'s table and
    on the command line.

    Args:
        name: its name in results.
        label: what texts and pages call it.
        applies: whether a task has the tokens for it.
        format: of its values, as in Python's format; "%" for shares.
        unit: of its values, such as "nats".
        column: the format of its column in `compare`'s table; None for no column.
        ends: "full" and "empty" to measure it of the full model and of no edges too.

    Raises ValueError if the name is taken.
    """

    def add(function: PairFunction) -> PairFunction:
        _add(
            Measure(
                name,
                label,
                label,
                lambda task: function if applies(task) else None,
                format=format,
                unit=unit,
                column=column,
                ends=ends,
                of_numbers=True,
            )
        )
        return function

    return add


def _add(measure: Measure) -> None:
    if measure.name in MEASURES:
        raise ValueError(
            f"a measure called {measure.name!r} is registered already: choose another name."
        )
    MEASURES[measure.name] = measure


# ------------------------------------------------------------------------------------ the functions


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


def _task_logit_diff(task: Any) -> PairFunction | None:
    """Needs one answer token and one distractor token per pair."""
    return (
        (lambda logits, full, batch: _logit_diff(logits, batch)) if _has_logit_diff(task) else None
    )


def _task_prob_diff(task: Any) -> PairFunction | None:
    """Needs right and wrong tokens for every pair."""
    return (lambda logits, full, batch: _prob_diff(logits, batch)) if _has_prob_diff(task) else None


def _task_log_prob(task: Any) -> PairFunction | None:
    """Only for a task whose metric it is."""
    if task.metric != "log-prob":
        return None
    return lambda logits, full, batch: -_negative_log_prob(logits, full, batch)


def _task_accuracy(task: Any) -> PairFunction | None:
    """The answer over the distractor; without one the answer is the top token; with sets of tokens
    only, the right ones are more probable.
    """
    if _has_logit_diff(task):
        return lambda logits, full, batch: _logit_diff(logits, batch) > 0
    if all(map(len, task.answers)):
        return lambda logits, full, batch: (logits.argmax(-1) == batch.answers).all(-1)
    if _has_prob_diff(task):
        return lambda logits, full, batch: _prob_diff(logits, batch) > 0
    return None


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


# ------------------------------------------------------------------------------------- the measures

for _measure in (
    Measure(
        "kl",
        "KL to the full model",
        "KL",
        lambda task: _kl,
        unit="nats",
        column=".3g",
        ends=("empty",),
        has_error=True,
        is_distance=True,
    ),
    Measure(
        "js",
        "Jensen–Shannon",
        for_task=lambda task: lambda logits, full, batch: jensen_shannon(logits, full),
        unit="nats",
        is_distance=True,
    ),
    Measure(
        "mse",
        "mean squared error",
        "squared error",
        lambda task: _mean_squared_error,
        format=".3g",
        column=".3g",
        ends=("empty",),
        is_distance=True,
        of_numbers=True,
        unless=("logit_diff", "prob_diff"),
    ),
    Measure(
        "logit_diff",
        "logit difference",
        "logit diff",
        _task_logit_diff,
        format=".2f",
        column=".2f",
        ends=("full", "empty"),
    ),
    Measure(
        "prob_diff",
        "probability difference",
        "prob diff",
        _task_prob_diff,
        ends=("full", "empty"),
    ),
    Measure("log_prob", "log-probability", for_task=_task_log_prob, reported=False),
    Measure("recovered", "logit difference kept", format=".1%", column=".2f"),
    Measure(
        "faithfulness",
        "faithfulness",
        "faithfulness",
        column=".2f",
        note=" (full model 1, no edges 0)",
    ),
    Measure(
        "exact_match",
        "exact match",
        "exact match",
        lambda task: lambda logits, full, batch: same_top(logits, full),
        format=".1%",
        column=".1%",
    ),
    Measure("accuracy", "accuracy", "accuracy", _task_accuracy, format=".1%", column=".1%"),
    Measure(
        "wrong_agreement",
        "wrong as the model",
        "wrong as model",
        format=".1%",
        note=" of {n_wrong}",
    ),
):
    _add(_measure)
