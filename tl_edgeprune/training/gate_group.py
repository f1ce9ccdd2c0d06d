"""Gates on neurons while they are learned with the edges': their start, draws and sparsity.

They have hard-concrete gates, a controller and a budget of their own (gates.py), beside the edges'.
They start from integrated gradients: the gradient of the objective by the gates, every edge kept,
averaged over a path on which all gates rise from 0 to 1 together.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.training.controllers import ExactBudget
from tl_edgeprune.training.gates import first_log_alpha, open_probability, top_gates
from tl_edgeprune.training.settings import PrunerSettings


class LearnedNeurons:
    """The neurons' log alphas in one run of an EdgePruner."""

    def __init__(
        self,
        pruner: PrunerSettings,
        run: MaskedModel,
        scores: Float[Tensor, "place unit"] | None,
        generator: torch.Generator,
    ) -> None:
        """`scores`: what the first log alphas are ranked by (None: drawn from the generator)."""
        self.pruner, self.shape = pruner, run.neuron_shape
        count = self.shape[0] * self.shape[1]
        controller = copy.deepcopy(pruner.neuron_controller)
        assert controller is not None  # EdgePruner gives one with neurons
        self.controller = controller
        self.controller.start(count, pruner.n_neurons)
        flat = None if scores is None else scores.flatten().abs()
        start = first_log_alpha(pruner.init_log_alpha, count, flat, generator)
        device = run.sites.attention[0].output.device
        self.log_alpha = start.to(device).requires_grad_()

    def target(self, progress: float, generator: torch.Generator) -> float:
        """Neurons to keep at this point of the run."""
        return self.controller.target(progress, float(torch.rand((), generator=generator)))

    def draw(
        self, target: float, progress: float, generator: torch.Generator
    ) -> tuple[Float[Tensor, "place unit"], Tensor | float]:
        """Gates for one forward, and what the loss gains for them."""
        shifted = self.controller.gates(self.log_alpha, target)
        gates = self.pruner.sampler(shifted, generator)
        penalty = self.controller.penalty(gates, shifted, target)
        if self.has_budget and progress >= 1 - self.pruner.hard_share:
            size = self.pruner.n_neurons
            if size is None or isinstance(self.controller, ExactBudget):
                size = max(1, round(target))
            gates = top_gates(shifted, self.log_alpha.detach(), size)
        return gates.view(self.shape), penalty

    def expected(self, target: float) -> float:
        """How many gates are open, in expectation."""
        with torch.no_grad():
            return float(open_probability(self.controller.gates(self.log_alpha, target)).sum())

    @property
    def has_budget(self) -> bool:
        return self.pruner.n_neurons is not None or isinstance(self.controller, ExactBudget)

    def ranking(self) -> Float[Tensor, "place unit"]:
        """log alpha of every neuron, on the CPU."""
        return self.log_alpha.detach().cpu().view(self.shape)

    def final_size(self) -> int | None:
        """Neurons to keep: as asked, or as many as a run without a budget expects to."""
        if self.has_budget:
            return self.pruner.n_neurons
        return max(1, round(float(torch.sigmoid(self.ranking()).sum())))
