"""A warning where the model does a task no better than chance: there is no circuit to find then.

The full model's logits, which are computed as targets anyway, are looked at as they come: on the
first pairs, does the answer's logit exceed the distractor's (or have the right tokens more
probability than the wrong ones)? One of two is right by chance.
"""

from __future__ import annotations

import sys
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.tasks.answer_logits import logit_diff, prob_diff
from tl_edgeprune.tasks.batch import Batch

LOOK_AT = 64  # pairs
LEAST = 16  # fewer say nothing
CHANCE = 0.55


class ChanceWatch:
    """Counts right answers among the first pairs of a task, and warns once it has seen enough.

    name: the task's. n_pairs: how many there are.
    """

    def __init__(self, name: str, n_pairs: int) -> None:
        self.name, self.n_pairs = name, n_pairs
        self.right, self.seen = 0, set[int]()
        self.done = n_pairs < LEAST

    @torch.no_grad()
    def see(self, full: Float[Tensor, "batch read vocab"], batch: Batch) -> None:
        """Take in the full model's logits on a batch; pairs that were seen count once."""
        measured = None if self.done else _measure(full, batch)
        if measured is None:
            self.done = True
            return
        for index, value in zip(batch.indices.tolist(), measured.tolist(), strict=True):
            if index not in self.seen:
                self.seen.add(index)
                self.right += value > 0
        if len(self.seen) >= min(LOOK_AT, self.n_pairs):
            self.done = True
            self._judge()

    def _judge(self) -> None:
        share = self.right / len(self.seen)
        if share <= CHANCE:
            warnings.warn(
                f"the model does task {self.name!r} at chance: the answer is above the distractor "
                f"on {share:.0%} of {len(self.seen)} prompts. What is found is then no circuit for "
                "the task: take a larger model, an easier form of the task, or only the prompts "
                "that it does right, tasks.keep_solved(model, task).",
                stacklevel=_outside(),
            )


def _measure(full: Tensor, batch: Batch) -> Tensor | None:
    """Above 0 where a pair is right; None where nothing can be right by chance."""
    if batch.answers.shape[1] == batch.distractors.shape[1] == 1:
        return logit_diff(full, batch)
    if batch.right is not None and batch.wrong is not None and full.shape[1] == 1:
        return prob_diff(full, batch)
    return None


def _outside() -> int:
    """The stack level of whoever called this package, for `_judge`'s warning to point at."""
    level, found, frame = 1, 1, sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("tl_edgeprune"):
            found = level
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    return found + 1
