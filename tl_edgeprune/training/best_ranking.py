"""The best of the rankings that the last part of a run goes through.

In that part the edges around the circuit's size change places from step to step, and a single one
can be worth much: which ones the last step keeps is chance. So some of the rankings are judged,
each by its circuit's objective on the same few pairs of the task, and the best is the result.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.distributed import Ranks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.objectives import Objective, losses
from tl_edgeprune.runs.targets import Teacher
from tl_edgeprune.tasks.batch import Batch

LATE = 0.2  # the part of a run that is looked at
JUDGES = 32  # pairs
UNKNOWN = torch.finfo(torch.float32).max


class Candidates:
    """The ranking whose circuit of `size` edges had the lowest objective so far."""

    def __init__(
        self,
        run: MaskedModel,
        teacher: Teacher,
        loss_of: Objective,
        size: int,
        batch_size: int,
        ranks: Ranks,
    ) -> None:
        self.run, self.teacher, self.loss_of = run, teacher, loss_of
        self.size, self.batch_size, self.ranks = size, batch_size, ranks
        self.best = torch.zeros(run.graph.n_edges, device=teacher.device)
        self.lowest = torch.tensor(UNKNOWN, device=teacher.device)
        self._judges: list[Batch] = []

    @staticmethod
    def due(step: int, steps: int, count: int) -> bool:
        """Whether the ranking after this step is one of the `count` that are judged."""
        span = max(1, round(LATE * steps))
        left = steps - 1 - step
        return left < span and left % math.ceil(span / count) == 0

    def take_in(self, ranking: Float[Tensor, " edge"]) -> None:
        """Judge a ranking; of equals, the later one stays."""
        loss = torch.tensor(self._loss(ranking), device=self.lowest.device)
        self.ranks.hand_out([loss])
        if loss <= self.lowest:
            self.best.copy_(ranking)
            self.lowest.copy_(loss)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {"best": self.best, "lowest": self.lowest}

    def found(self) -> Float[Tensor, " edge"] | None:
        """The best so far, if any was judged."""
        return self.best if float(self.lowest) < UNKNOWN else None

    @torch.no_grad()
    def _loss(self, ranking: Float[Tensor, " edge"]) -> float:
        mask = Circuit.top(self.run.graph, ranking.cpu(), self.size).mask
        on_device, total, pairs = mask.float().to(self.teacher.device), 0.0, 0
        for batch in self._pairs():
            lesson = self.teacher.lesson(batch)
            batch = lesson.batch
            logits = self.run(
                batch.clean, on_device, lesson.reference, batch.positions, spans=batch.spans
            )
            total += float(losses(self.loss_of, logits, lesson.full, batch).sum())
            pairs += len(batch)
        return total / pairs

    def _pairs(self) -> list[Batch]:
        """The same for every ranking and in every process, whatever their number, at most as many
        at once as one process trains on.
        """
        if not self._judges:
            left = JUDGES
            for batch in self.teacher.task.batches(self.batch_size, True, 0):
                batch = batch.first(left)
                self._judges += [batch.select(rows) for rows in self.ranks.rows_of_all(len(batch))]
                left -= len(batch)
                if not left:
                    break
        return self._judges
