"""Constants that removed edges carry, while they are learned: their start and their optimiser.

A source's constant is a mean over prompts and positions plus a move, in units of the root mean
square of its kind (inputs, heads, MLPs), so that one learning rate fits all. The moves are what is
learned, in float32 whatever the model's dtype.

Li and Janson 2024, "Optimal Ablation for Interpretability", section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_edgeprune.ablation.constants import NAMES, Constants
from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.runs.checkpoint import Stateful


class LearnedConstants(Stateful):
    """The constants of a model's sources, learned by Adam from their means over prompts.

    Args:
        run: the masked model.
        prompts: the prompts that the means are over, each [pos].
        lr: learning rate, in units of each kind's root mean square.
    """

    def __init__(self, run: MaskedModel, prompts: Sequence[Tensor], lr: float) -> None:
        means = run.reference("mean", prompts=prompts)
        self.run, self.lr = run, lr
        # inputs [input, d_model], z [layer, head, d_head], mlp [mlp, d_model]
        self.start = [getattr(means, name)[:, 0, 0].clone() for name in NAMES]
        self.units = [
            t.float().square().mean().sqrt().clamp(min=1e-3) if t.numel() else t.float().sum()
            for t in self.start
        ]
        self.moves = [
            torch.zeros_like(t, dtype=torch.float32, requires_grad=True) for t in self.start
        ]
        self.optimizer = torch.optim.Adam(self.moves, lr=lr)

    def reference(self) -> Reference:
        """What removed edges carry now; gradients flow into the moves."""
        return self.constants().reference(self.run.sites, self.run.graph)

    def constants(self, metadata: dict[str, Any] | None = None) -> Constants:
        """The constants as they are now, differentiable in the moves."""
        by_kind: dict[str, Tensor] = {
            name: start + unit * move
            for name, start, unit, move in zip(
                NAMES, self.start, self.units, self.moves, strict=True
            )
        }
        return Constants(self.run.graph, **by_kind, metadata=metadata or {})

    def step(self, rate: float = 1.0) -> None:
        """One step of Adam at `rate` times the learning rate; the gradients are then cleared."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"constants.{name}": move.detach() for name, move in zip(NAMES, self.moves, strict=True)
        }
