"""What makes gates sparse: an exact budget, the paper's Lagrangian, or a penalty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tl_edgeprune.training.gates import budget_shift, open_probability

# ---------------------------------------------------------------------------- sparsity controllers


@runtime_checkable
class Controller(Protocol):
    """Makes a run sparse: it shifts log alphas, adds to the loss, or learns multipliers."""

    def start(self, n_edges: int, budget: int | None) -> None:
        """Begin a run over `n_edges` for a circuit of `budget` edges (None: of any size)."""

    def target(self, progress: float, draw: float) -> float:
        """Edges to keep at this point of the run; `progress` and `draw` are in [0, 1)."""

    def gates(self, log_alpha: Tensor, target: float) -> Tensor:
        """The log alphas to draw gates with: these, unless the controller shifts them."""
        return log_alpha

    def penalty(self, mask: Tensor, log_alpha: Tensor, target: float) -> Tensor | float:
        """The term in the loss for the drawn mask, or for the log alphas it was drawn from."""
        return 0.0

    def learned(self) -> dict[str, Tensor]:
        """Multipliers to be trained by gradient ascent, by name."""
        return {}


@dataclass
class ExactBudget(Controller):
    """The expected number of kept edges is exactly the budget at every step.

    Args:
        schedule: "annealed": the budget falls geometrically to that of the run. "sampled": it is
            log-uniform at every step, between `start_share` and a lower end that falls
            geometrically to `low_share`, so that one run ranks edges for circuits of every size.
            "fixed": it is that of the run.
        start_share, low_share: where budgets start and end, as shares of all edges.
        anneal: the share of the run over which they fall.
    """

    schedule: Literal["annealed", "sampled", "fixed"] = "annealed"
    start_share: float = 0.3
    low_share: float = 0.002
    anneal: float = 0.6
    n_edges: int = field(default=0, init=False)
    budget: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.schedule not in ("annealed", "sampled", "fixed"):
            raise ValueError(
                f"unknown schedule {self.schedule!r}: expected annealed, sampled or fixed."
            )
        _check_share("anneal", self.anneal)

    def start(self, n_edges: int, budget: int | None) -> None:
        if budget is None and self.schedule != "sampled":
            raise ValueError(
                f"ExactBudget(schedule={self.schedule!r}) needs n_edges, a budget to aim at."
            )
        self.n_edges, self.budget = n_edges, float(budget or 0)

    def target(self, progress: float, draw: float) -> float:
        top = max(self.start_share * self.n_edges, self.budget)
        if self.schedule == "fixed":
            target = self.budget
        elif self.schedule == "annealed":
            target = self._annealed(top, self.budget, progress)
        else:
            low = max(1.0, self.low_share * self.n_edges)
            top = max(top, low)
            target = self._annealed(top, low, progress)
            target *= (top / target) ** draw
        return min(max(target, 0.5), self.n_edges - 0.5)

    def _annealed(self, top: float, end: float, progress: float) -> float:
        """A geometric fall from `top` to `end` over the first `anneal` of the run."""
        return top * (end / top) ** min(1.0, progress / self.anneal)

    def gates(self, log_alpha: Tensor, target: float) -> Tensor:
        return log_alpha + budget_shift(log_alpha, target)


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name}={share}: expected a share of the run, above 0 and up to 1.")


@dataclass
class Lagrangian(Controller):
    """The paper's controller: L + lambda1 (t - s) + lambda2 (t - s)^2, the lambdas by ascent.

    s is the sparsity of the *drawn* mask, as in the published code; t rises linearly.

    Args:
        target_sparsity: t at the end, by default that of the budget. Above 1 it pushes harder (the
            paper's code uses up to 1.2).
        start_sparsity: t at the start.
        warmup: the share of the run over which t rises.
    """

    target_sparsity: float | None = None
    start_sparsity: float = 0.0
    warmup: float = 0.83
    lambda1: Tensor = field(default_factory=lambda: torch.zeros(()))
    lambda2: Tensor = field(default_factory=lambda: torch.zeros(()))
    n_edges: int = field(default=0, init=False)
    budget: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        _check_share("warmup", self.warmup)

    def start(self, n_edges: int, budget: int | None) -> None:
        if budget is None and self.target_sparsity is None:
            raise ValueError("Lagrangian needs n_edges or target_sparsity, a sparsity to aim at.")
        self.n_edges, self.budget = n_edges, budget
        self.lambda1 = torch.zeros((), requires_grad=True)
        self.lambda2 = torch.zeros((), requires_grad=True)

    def target(self, progress: float, draw: float) -> float:
        final = self.target_sparsity
        if final is None:
            assert self.budget is not None
            final = 1 - self.budget / self.n_edges
        sparsity = self.start_sparsity + (final - self.start_sparsity) * min(
            1.0, progress / self.warmup
        )
        return (1 - sparsity) * self.n_edges

    def penalty(self, mask: Tensor, log_alpha: Tensor, target: float) -> Tensor:
        gap = (1 - target / self.n_edges) - (1 - mask.mean())
        return self.lambda1.to(mask.device) * gap + self.lambda2.to(mask.device) * gap**2

    def learned(self) -> dict[str, Tensor]:
        return {"lambda1": self.lambda1, "lambda2": self.lambda2}


@dataclass
class Penalty(Controller):
    """A fixed price on the expected share of open gates, weight * mean P(open), without a target.

    Args:
        weight: nats that the whole graph costs.
        probability: P(open) of a log alpha, by default that of the hard-concrete gate.
    """

    weight: float = 10.0
    probability: Callable[[Tensor], Tensor] = open_probability
    n_edges: int = field(default=0, init=False)

    def start(self, n_edges: int, budget: int | None) -> None:
        self.n_edges = n_edges

    def target(self, progress: float, draw: float) -> float:
        return float(self.n_edges)

    def penalty(self, mask: Tensor, log_alpha: Tensor, target: float) -> Tensor:
        return self.weight * self.probability(log_alpha).mean()
