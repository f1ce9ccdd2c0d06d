"""Measures of a pair's answers from logits: logit difference and probability difference."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.tasks.batch import NO_TOKEN, Batch


def logit_diff(logits: Float[Tensor, "batch read vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """Logit of the answer minus logit of the distractor, in logits."""
    answer = values_at(logits, batch.answers)
    return (answer - values_at(logits, batch.distractors)).squeeze(1)


def prob_diff(logits: Float[Tensor, "batch read vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """Total probability of the right tokens minus that of the wrong ones, from -1 to 1.

    At the single read position. Hanna, Liu and Variengien 2023, "How does GPT-2 compute
    greater-than?".
    """
    probabilities = log_probabilities(logits)[:, 0].exp()
    return _mass(probabilities, batch.right) - _mass(probabilities, batch.wrong)


def log_probabilities(
    logits: Float[Tensor, "batch read vocab"],
) -> Float[Tensor, "batch read vocab"]:
    """Log probabilities, in float32 at least: half precision is too coarse.

    Raises ValueError for a single output, whose probability is always 1.
    """
    if logits.shape[-1] == 1:
        raise ValueError(
            "the model's output is one number, which has no probabilities: use objective='mse' "
            "(for a task: Task(…, objective='mse'))."
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def values_at(
    values: Float[Tensor, "batch read vocab"], tokens: Int[Tensor, "batch read"]
) -> Tensor:
    """The values of the given tokens, [batch, read]."""
    return torch.gather(values, 2, tokens.to(values.device).unsqueeze(-1)).squeeze(-1)


def _mass(
    probabilities: Float[Tensor, "batch vocab"], tokens: Int[Tensor, "batch token"] | None
) -> Float[Tensor, " batch"]:
    """The sum over each row's tokens, without NO_TOKEN."""
    if tokens is None:
        return probabilities.new_zeros(len(probabilities))
    tokens = tokens.to(probabilities.device)
    token_probabilities = probabilities.gather(1, tokens.clamp(min=0))
    return token_probabilities.masked_fill(tokens == NO_TOKEN, 0).sum(1)
