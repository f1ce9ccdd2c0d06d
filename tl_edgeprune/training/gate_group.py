"""The gates of one kind in a run: on edges, on sources or on neurons.

A group holds the gates' log alphas and the controller that makes them sparse. A draw gives a mask,
the log alphas that it was drawn from and the penalty on it (gates.py, controllers.py). In the last
part of a run with a budget, a draw keeps exactly the top gates, as the final circuit will.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.runs.checkpoint import Stateful
from tl_edgeprune.training.controllers import Controller, ExactBudget
from tl_edgeprune.training.gates import open_probability, sample_gates, top_gates
from tl_edgeprune.training.settings import Sampler


class Draw(NamedTuple):
    """Gates for one forward pass, and the penalty on them.

    `log_alpha` is what they were drawn from, after the controller's shift; differentiable.
    """

    gates: Float[Tensor, " gate"]
    log_alpha: Float[Tensor, " gate"]
    penalty: Tensor | float


@dataclass(eq=False)
class GateGroup(Stateful):
    """Gates that are learned together, under one controller, of which the group starts a copy."""

    prefix: str  # of its tensors in a checkpoint: "" for edges, "node_", "neuron_"
    log_alpha: Float[Tensor, " gate"]  # on the device of the run
    controller: Controller | None  # None for gates without a price
    size: int | None = None  # gates to keep at the end
    sampler: Sampler = sample_gates
    hard_share: float = 0.0  # final fraction of the run that keeps exactly the top gates
    shifts: bool = True  # whether the controller also shifts the log alphas before a draw

    def __post_init__(self) -> None:
        self.log_alpha.requires_grad_()
        self.last_drawn = self.log_alpha.detach()  # log alphas that the last gates were drawn from
        self.controller = copy.deepcopy(self.controller)
        if self.controller is not None:
            self.controller.start(self.log_alpha.numel(), self.size)

    @property
    def has_budget(self) -> bool:
        """Whether a number of gates to keep is known, for the run or for each step."""
        return self.size is not None or isinstance(self.controller, ExactBudget)

    def is_hard(self, progress: float) -> bool:
        """Whether draws at this point of the run (in [0, 1)) keep exactly the top gates."""
        return self.has_budget and progress >= 1 - self.hard_share

    def target(self, progress: float, draw: float) -> float:
        """Gates to keep at this point of the run; `draw` is a uniform random number."""
        if self.controller is None:
            return float(self.log_alpha.numel())
        return self.controller.target(progress, draw)

    def shifted(self, target: float) -> Float[Tensor, " gate"]:
        """The log alphas that gates are drawn from at this target."""
        if self.controller is None or not self.shifts:
            return self.log_alpha
        return self.controller.gates(self.log_alpha, target)

    def draw(
        self,
        target: float,
        generator: torch.Generator,
        hard_ranking: Float[Tensor, " gate"] | None = None,
    ) -> Draw:
        """Gates for one forward pass; with `hard_ranking`, exactly the top ones by it.

        The penalty is that of the sampled gates in either case.
        """
        log_alpha = self.shifted(target)
        self.last_drawn = log_alpha.detach()
        gates = self.sampler(log_alpha, generator)
        penalty: Tensor | float = 0.0
        if self.controller is not None:
            penalty = self.controller.penalty(gates, log_alpha, target)
        if hard_ranking is not None:
            gates = top_gates(log_alpha, hard_ranking, self._hard_size(target))
        return Draw(gates, log_alpha, penalty)

    def _hard_size(self, target: float) -> int:
        """Gates of a hard draw: the step's budget, or the final size if there is none."""
        if self.size is None or isinstance(self.controller, ExactBudget):
            return max(1, round(target))
        return self.size

    @torch.no_grad()
    def expected_open(self, log_alpha: Float[Tensor, " gate"]) -> float:
        """The expected number of open gates among those drawn from `log_alpha`."""
        probability = getattr(self.controller, "probability", open_probability)
        return float(probability(log_alpha).sum())

    def final_size(self, probability: Float[Tensor, "..."]) -> int | None:
        """Gates to keep at the end: `size`, or without a budget as many as the run expects to keep.

        probability: of each gate to be kept.
        """
        return self.size if self.has_budget else max(1, round(float(probability.sum())))

    # ----------------------------------------------------------------------------- learned, saved

    def multipliers(self) -> dict[str, Tensor]:
        """What the controller learns, by its names in a checkpoint."""
        learned = {} if self.controller is None else self.controller.learned()
        return {f"{self.prefix}{name}": tensor for name, tensor in learned.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{self.prefix}log_alpha": self.log_alpha, **self.multipliers()}
