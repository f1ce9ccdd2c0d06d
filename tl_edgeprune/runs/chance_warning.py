"""A warning if the model does a task no better than chance: there is then no circuit to find.

The full model's logits are targets anyway; on the first pairs, `ChanceWatch` counts how often the
answer's logit exceeds the distractor's (or the right tokens have more probability than the wrong
ones). Half of the pairs are right by chance.
"""

from __future__ import annotations

import sys
import traceback
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.tasks.answer_logits import logit_diff, prob_diff
from tl_edgeprune.tasks.batch import Batch

N_PAIRS = 64  # pairs that are counted
MIN_PAIRS = 16  # fewer say nothing
CHANCE = 0.55


class ChanceWatch:
    """Counts right answers among the first pairs of a task, and warns once it has enough.

    name: the task's. n_pairs: how many the task has.
    """

    def __init__(self, name: str, n_pairs: int) -> None:
        self.name, self.n_pairs = name, n_pairs
        self.right, self.seen = 0, set[int]()
        self.done = n_pairs < MIN_PAIRS

    @torch.no_grad()
    def see(self, full: Float[Tensor, "batch read vocab"], batch: Batch) -> None:
        """Count the full model's right answers on a batch; a pair counts once."""
        measured = None if self.done else _measure(full, batch)
        if measured is None:
            self.done = True
            return
        for index, value in zip(batch.indices.tolist(), measured.tolist(), strict=True):
            if index not in self.seen:
                self.seen.add(index)
                self.right += value > 0
        if len(self.seen) >= min(N_PAIRS, self.n_pairs):
            self.done = True
            self._warn_at_chance()

    def _warn_at_chance(self) -> None:
        share = self.right / len(self.seen)
        if share <= CHANCE:
            warnings.warn(
                f"the model performs at chance on task {self.name!r}: the answer is above the "
                f"distractor on {share:.0%} of {len(self.seen)} prompts, so there is no circuit "
                "for the task to find. Use a larger model, an easier form of the task, or only "
                "the prompts that the model gets right, tasks.keep_solved(model, task).",
                stacklevel=callers_stack_level(),
            )


def _measure(full: Tensor, batch: Batch) -> Tensor | None:
    """Above 0 for right answers; None if the task has no chance level."""
    if batch.answers.shape[1] == batch.distractors.shape[1] == 1:
        return logit_diff(full, batch)
    if batch.right is not None and batch.wrong is not None and full.shape[1] == 1:
        return prob_diff(full, batch)
    return None


def callers_stack_level() -> int:
    """For a warning in the function that calls this: the stack level of the package's caller.

    The frames of other packages (decorators, callbacks) lie between those of this one, so the
    outermost frame of the package counts.
    """
    frames = traceback.walk_stack(sys._getframe(1))
    names = [str(frame.f_globals.get("__name__", "")) for frame, _ in frames]
    package_levels = [
        level for level, name in enumerate(names, 1) if name.startswith("tl_edgeprune")
    ]
    return package_levels[-1] + 1
