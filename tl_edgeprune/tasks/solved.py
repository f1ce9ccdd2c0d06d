"""Which prompts a model solves: a circuit is best sought where there is one to find.

A prompt with an answer is solved if the answer's logit is above that of the distractor and of every
wrong token (above all others, if the pair has none) at every read position. A prompt with only sets
of tokens is solved if the right tokens have more probability than the wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_edgeprune.tasks.answer_logits import prob_diff
from tl_edgeprune.tasks.batch import NO_TOKEN, Batch
from tl_edgeprune.tasks.task import Task


def solved(model: nn.Module, task: Task, *, batch_size: int = 16) -> Bool[Tensor, " pair"]:
    """Whether the model solves each clean prompt of the task (bool [pair], on the CPU).

    One forward pass per batch, in eval mode and without gradients; the model is left unchanged.

    Raises:
        ValueError: a pair has neither an answer nor sets of right and wrong tokens.
    """
    _check(task)
    right = torch.zeros(len(task), dtype=torch.bool)
    device = next(model.parameters()).device
    with torch.no_grad(), _in_eval_mode(model):
        for batch in task.batches(batch_size):
            batch = batch.to(device)
            logits = model(batch.clean)
            read_indices = batch.read_positions[..., None].expand(-1, -1, logits.shape[-1])
            right[batch.indices.cpu()] = is_right(logits.gather(1, read_indices), batch).cpu()
    return right


def keep_solved(model: nn.Module, task: Task, *, batch_size: int = 16) -> Task:
    """The pairs whose clean prompt the model solves, in their order.

    Raises:
        ValueError: the model solves none; or as `solved` does.
    """
    solved_pairs = solved(model, task, batch_size=batch_size).nonzero()[:, 0].tolist()
    if not solved_pairs:
        raise ValueError(
            f"the model does none of the {len(task)} prompts of task {task.name!r} right: there is "
            "no circuit for it to find. Use another task or model."
        )
    return task.subset(solved_pairs)


def is_right(logits: Float[Tensor, "batch read vocab"], batch: Batch) -> Bool[Tensor, " batch"]:
    """Whether each prompt is solved, by its logits at the read positions."""
    if not batch.answers.shape[1]:
        return prob_diff(logits, batch) > 0
    answer = logits.gather(-1, batch.answers[..., None])  # [batch, read, 1]
    rivals = _rivals(batch)
    is_token = rivals != NO_TOKEN
    highest = logits.gather(-1, rivals.clamp(min=0)).masked_fill(~is_token, -torch.inf)
    beats_rivals = (answer > highest).all(-1)
    is_top = logits.argmax(-1) == batch.answers
    return torch.where(is_token.any(-1), beats_rivals, is_top).all(-1)


def _rivals(batch: Batch) -> Tensor:
    """The tokens that the answer must beat at each read position [batch, read, rival]."""
    none = batch.answers.new_full((*batch.answers.shape, 1), NO_TOKEN)
    rivals = batch.distractors[..., None] if batch.distractors.shape[1] else none
    if batch.wrong is None or batch.answers.shape[1] != 1:
        return rivals
    return torch.cat([rivals, batch.wrong[:, None]], dim=-1)


def _check(task: Task) -> None:
    for pair in range(len(task)):
        has_sets = len(task.right[pair]) and len(task.wrong[pair])
        if not len(task.answers[pair]) and not has_sets:
            raise ValueError(
                f"pair {pair} of task {task.name!r} has neither an answer nor right and wrong "
                "tokens, so nothing says what is right."
            )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
