"""What a circuit should keep: the losses that are minimised, one number a prompt.

An objective takes the masked model's logits and the full model's at the same read positions, and
the batch (for its answers, distractors and sets of tokens). Lower is better; what should be high
enters negated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.tasks.answer_logits import log_probabilities, logit_diff, prob_diff, values_at
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.tasks.task import Task


@runtime_checkable
class Objective(Protocol):
    """logits, full [batch, read, vocab] and the batch -> loss [batch]."""

    def __call__(self, logits: Tensor, full: Tensor, batch: Batch) -> Tensor: ...


def kl(
    logits: Float[Tensor, "batch read vocab"], full: Float[Tensor, "batch read vocab"], batch: Batch
) -> Float[Tensor, " batch"]:
    """KL(full model || circuit), mean over read positions, in nats (Bhaskar et al. 2024, eq. 4)."""
    log_full, log_circuit = log_probabilities(full), log_probabilities(logits)
    return (log_full.exp() * (log_full - log_circuit)).sum(-1).mean(-1)


def mean_squared_error(
    logits: Float[Tensor, "batch read vocab"], full: Float[Tensor, "batch read vocab"], batch: Batch
) -> Float[Tensor, " batch"]:
    """Mean squared difference of the outputs, for models that answer with numbers (Tracr)."""
    return (logits - full).pow(2).mean((-1, -2))


def negative_logit_diff(
    logits: Float[Tensor, "batch read vocab"], full: Tensor, batch: Batch
) -> Float[Tensor, " batch"]:
    """Minus the logit of the answer less that of the distractor (Wang et al. 2022), one token
    each.
    """
    return -logit_diff(logits, batch)


def negative_log_prob(
    logits: Float[Tensor, "batch read vocab"], full: Tensor, batch: Batch
) -> Float[Tensor, " batch"]:
    """Minus the log-probability of the answer's tokens, mean over read positions, in nats."""
    return -values_at(log_probabilities(logits), batch.answers).mean(-1)


def negative_prob_diff(
    logits: Float[Tensor, "batch read vocab"], full: Tensor, batch: Batch
) -> Float[Tensor, " batch"]:
    """Minus the probability of the right tokens less that of the wrong ones (Hanna et al. 2023)."""
    return -prob_diff(logits, batch)


def losses(
    objective: Objective, logits: Float[Tensor, "batch read vocab"], full: Tensor, batch: Batch
) -> Float[Tensor, " batch"]:
    """What the objective gives. Raises ValueError for anything but one number a pair, and for what
    has no gradient where the logits have one: all objectives are called through here.
    """
    values, shape = objective(logits, full, batch), (len(batch),)
    name = getattr(objective, "__name__", "the function")
    if not isinstance(values, Tensor) or values.shape != shape:
        description = (
            f"a tensor of shape {tuple(values.shape)}"
            if isinstance(values, Tensor)
            else f"{values!r:.100}"
        )
        raise ValueError(
            f"objective {name}: gave {description} for {len(batch)} pairs (logits "
            f"{tuple(logits.shape)}), expected [batch], {shape}: one number per pair, a mean over "
            "its read positions."
        )
    if logits.requires_grad and not values.requires_grad:
        raise ValueError(
            f"objective {name}: gave [batch] without a gradient, and this method differentiates "
            "it: compute it from the logits by PyTorch alone (no detach, argmax or comparison), or "
            "take a method that needs no gradient: acdc, exact."
        )
    return values


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "kl": kl,
    "mse": mean_squared_error,
    "logit-diff": negative_logit_diff,
    "log-prob": negative_log_prob,
    "prob-diff": negative_prob_diff,
}
# They look at the answers alone, and never at `full`.
WITHOUT_TARGETS: tuple[Objective, ...] = (
    negative_logit_diff,
    negative_log_prob,
    negative_prob_diff,
)


def find_objective(wanted: str | Objective | None, task: Task) -> Objective:
    """The objective by name, the task's own for None, or the callable itself.

    Raises ValueError for an unknown name, and where the task's answers do not suffice for it.
    """
    if callable(wanted):
        return wanted
    name = wanted or task.objective
    if name not in OBJECTIVES:
        raise ValueError(
            f"unknown objective {name!r}: expected one of {', '.join(OBJECTIVES)}, or a function "
            "(logits, full, batch) -> loss [batch]."
        )
    if name in ("logit-diff", "log-prob"):
        _check_answers(name, task)
    if name == "prob-diff":
        _check_sets(task)
    return OBJECTIVES[name]


def find_measure(measure: str | Objective | None, task: Task) -> Objective:
    """The objective whose negative is measured; None for the task's own `metric`."""
    return find_objective(measure or task.metric, task)


def has_logit_diff(task: Task) -> bool:
    """Whether every pair has one answer token and one distractor token."""
    return all(
        len(a) == 1 and len(d) == 1 for a, d in zip(task.answers, task.distractors, strict=True)
    )


def has_prob_diff(task: Task) -> bool:
    """Whether every pair has right tokens and wrong ones."""
    return all(map(len, task.right)) and all(map(len, task.wrong))


def _check_sets(task: Task) -> None:
    for pair, sets in enumerate(zip(task.right, task.wrong, strict=True)):
        if not all(map(len, sets)):
            raise ValueError(
                f"objective 'prob-diff' needs right and wrong tokens, but pair {pair} of task "
                f"{task.name!r} has {len(sets[0])} and {len(sets[1])}. Give Task right=… and "
                "wrong=…, or use 'kl'."
            )


def _check_answers(name: str, task: Task) -> None:
    for pair, (answer, distractor) in enumerate(zip(task.answers, task.distractors, strict=True)):
        if len(answer) == 0:
            raise ValueError(
                f"objective {name!r}: pair {pair} of task {task.name!r} has no answer tokens. Use "
                "'kl'."
            )
        if name == "logit-diff" and (len(answer), len(distractor)) != (1, 1):
            raise ValueError(
                "objective 'logit-diff' needs one answer token and one distractor token, but pair "
                f"{pair} of task {task.name!r} has {len(answer)} and {len(distractor)}. Use 'kl' "
                "or 'log-prob'."
            )
