"""The logit lens of what edges carry: their direct effect on the answer's logit.

1. The answer's score is its logit less that of the distractor; where a task has sets of tokens, the
   mean logit of the right ones less that of the wrong ones; with an answer alone, its logit less
   the mean of all.
2. Its gradient at what the logits read, with the final norm's scale held at that of this run, is a
   direction for each read position. The norm is then linear, and so is the unembedding.
3. A difference's direct effect is its product with that direction.

So the effects of all kept edges into the logits add up: the score of the circuit is theirs and that
of the reference stream together (of a soft cap on the logits, the tangent is taken). What is left
out: that a cut changes the norm's scale, and all that later heads and MLPs make of the difference.
The lens is nostalgebraist 2020's; with the scale held, it is Elhage et al. 2021's direct path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.forward.half_blocks import unembedded
from tl_edgeprune.hooks.norms import identity, norm_function
from tl_edgeprune.objectives import has_logit_diff, has_prob_diff
from tl_edgeprune.tasks.answer_logits import logit_diff
from tl_edgeprune.tasks.batch import NO_TOKEN, Batch
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.utils.grad_mode import with_gradients

Score = Callable[[Tensor, Batch], Tensor]
"""(logits [batch, read, vocab], batch) -> [batch]."""


def answer_score(task: Task) -> Score | None:
    """How far the logits favour a task's answers, in logits; None where it has none."""
    if has_logit_diff(task):
        return logit_diff
    if has_prob_diff(task):
        return _set_difference
    return _answer_over_mean if all(map(len, task.answers)) else None


def answer_direction(
    model: Any, x: Float[Tensor, "batch read d_model"], batch: Batch, score: Score
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch read d_model"]]:
    """The score of each pair where the logits read x, and its gradient with the final norm's scale
    held.
    """
    module = getattr(model, "ln_final", None)
    norm = identity if module is None else norm_function(module)
    frozen_norm = getattr(norm, "frozen", norm)
    x = x.detach().requires_grad_()
    with with_gradients("explain"):
        scores = score(unembedded(model, frozen_norm(x)), batch)
        (direction,) = torch.autograd.grad(scores.sum(), x)
    return scores.detach(), direction


def _set_difference(
    logits: Float[Tensor, "batch read vocab"], batch: Batch
) -> Float[Tensor, " batch"]:
    return _mean_logit(logits[:, 0], batch.right) - _mean_logit(logits[:, 0], batch.wrong)


def _mean_logit(
    logits: Float[Tensor, "batch vocab"], tokens: Int[Tensor, "batch token"] | None
) -> Float[Tensor, " batch"]:
    """The mean over each row's tokens, but for NO_TOKEN."""
    assert tokens is not None
    is_token = tokens != NO_TOKEN
    gathered = logits.gather(1, tokens.clamp(min=0)).masked_fill(~is_token, 0)
    return gathered.sum(1) / is_token.sum(1)


def _answer_over_mean(
    logits: Float[Tensor, "batch read vocab"], batch: Batch
) -> Float[Tensor, " batch"]:
    answer = logits.gather(2, batch.answers.unsqueeze(-1)).squeeze(-1)
    return (answer - logits.mean(-1)).mean(-1)
