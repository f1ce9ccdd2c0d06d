"""The ranking that a run ends with: the last step's, their mean, or the best of those evaluated.

1. Under sampled budgets each step pulls log alphas its own way, so the rankings of the run's last
   part are averaged (Izmailov et al. 2018).
2. Late in a run the edges around the circuit's size change places from step to step, and a single
   one can be worth much: which ones the last step keeps is chance. So some of the late rankings are
   evaluated, each by its circuit's objective on the same few pairs, and the best is the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.distributed import Ranks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.objectives import Objective, losses
from tl_edgeprune.runs.checkpoint import Stateful
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.training.settings import PrunerSettings

LATE = 0.2  # the final fraction of a run whose rankings are evaluated
N_PAIRS = 32  # that each ranking is evaluated on
NOT_EVALUATED = torch.finfo(torch.float32).max


@dataclass(eq=False)
class BestRanking(Stateful):
    """The ranking whose circuit of `size` edges had the lowest objective so far."""

    run: MaskedModel
    targets: Targets  # its task is what rankings are evaluated on
    loss_of: Objective
    size: int
    batch_size: int  # pairs per forward pass, over all processes
    ranks: Ranks  # the first of them decides

    def __post_init__(self) -> None:
        self.ranking = torch.zeros(self.run.graph.n_edges, device=self.targets.device)
        self.loss = torch.tensor(NOT_EVALUATED, device=self.targets.device)
        self._batches: list[Batch] = []

    @staticmethod
    def due(step: int, steps: int, count: int) -> bool:
        """Whether the ranking after this step is one of the `count` that are evaluated."""
        n_late = max(1, round(LATE * steps))
        n_following = steps - 1 - step
        return n_following < n_late and n_following % math.ceil(n_late / count) == 0

    def consider(self, ranking: Float[Tensor, " edge"]) -> None:
        """Evaluate a ranking; keep it if it is at least as good as the best so far."""
        loss = torch.tensor(self._loss_of(ranking), device=self.loss.device)
        self.ranks.broadcast([loss])
        if loss <= self.loss:
            self.ranking.copy_(ranking)
            self.loss.copy_(loss)

    def best(self) -> Float[Tensor, " edge"] | None:
        """The best ranking so far; None before any was evaluated."""
        return self.ranking if float(self.loss) < NOT_EVALUATED else None

    def state_dict(self) -> dict[str, Tensor]:
        return {"best": self.ranking, "lowest": self.loss}

    @torch.no_grad()
    def _loss_of(self, ranking: Float[Tensor, " edge"]) -> float:
        circuit = Circuit.top(self.run.graph, ranking.cpu(), self.size)
        mask, total, n_pairs = circuit.mask.float().to(self.targets.device), 0.0, 0
        for batch in self._evaluation_batches():
            target_batch = self.targets.prepare(batch)
            logits = self.run.logits(target_batch, mask)  # [batch, read, vocab]
            total += float(
                losses(self.loss_of, logits, target_batch.full, target_batch.batch).sum()
            )
            n_pairs += len(batch)
        return total / n_pairs

    def _evaluation_batches(self) -> list[Batch]:
        """The same pairs for every ranking and in every process.

        No batch has more pairs than one process trains on.
        """
        if not self._batches:
            n_missing = N_PAIRS
            for batch in self.targets.task.batches(self.batch_size, True, 0):
                batch = batch.first(n_missing)
                self._batches += [batch.select(rows) for rows in self.ranks.rows_of_all(len(batch))]
                n_missing -= len(batch)
                if not n_missing:
                    break
        return self._batches


class FinalRanking(Stateful):
    """The ranking that a run ends with.

    Args:
        log_alpha: [edge], of the run.
        pruner: `average_share` of its `steps` are averaged, `candidates` are evaluated.
        best: evaluates them; None for a run that does not end with one circuit of edges.
    """

    def __init__(
        self, log_alpha: Float[Tensor, " edge"], pruner: PrunerSettings, best: BestRanking | None
    ) -> None:
        self.mean = torch.zeros_like(log_alpha, requires_grad=False)
        self.pruner, self.best = pruner, best
        self.first_averaged = pruner.steps - round(pruner.average_share * pruner.steps)

    def add(self, ranking: Float[Tensor, " edge"], step: int) -> None:
        """Take in the ranking after this step: average it, and evaluate it if it is due."""
        n_averaged = step + 1 - self.first_averaged
        if n_averaged > 0:
            self.mean += (ranking - self.mean) / n_averaged
        pruner = self.pruner
        if self.best is not None and self.best.due(step, pruner.steps, pruner.candidates):
            self.best.consider(self._averaged(ranking, step + 1))

    def after(self, n_steps: int, ranking: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
        """The ranking of a run that ends after `n_steps`, the last of which gave `ranking`."""
        best = None if self.best is None else self.best.best()
        return self._averaged(ranking, n_steps) if best is None else best

    def _averaged(self, ranking: Tensor, n_steps: int) -> Tensor:
        return self.mean if n_steps > self.first_averaged else ranking

    def state_dict(self) -> dict[str, Tensor]:
        return {"average": self.mean, **({} if self.best is None else self.best.state_dict())}
