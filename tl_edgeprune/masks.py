"""Learnable masks: hard-concrete gates, and the two ways to make them sparse.

1. A gate draws u ~ U(eps, 1 - eps), s = sigmoid((log u - log(1 - u) + log alpha) / beta), and is
   z = clamp(s (zeta - gamma) + gamma, 0, 1): 0 or 1 much of the time, differentiable in between.
   P(z != 0) = sigmoid(log alpha - beta log(-gamma / zeta)). (Louizos et al. 2018, equations 10 to
   12.)
2. `Lagrangian` is the paper's controller: the loss gains lambda1 (t - s) + lambda2 (t - s)^2 for
   sparsity s and target t, and the lambdas ascend. (Bhaskar et al. 2024, section 3.)
3. `ExactBudget` shifts every log alpha by one number tau, so that the expected number of kept edges
   is the budget. Parameters then learn the ranking of edges, and no multiplier needs tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
EPS = 1e-6
OPEN_OFFSET = BETA * math.log(-GAMMA / ZETA)


def sample_gates(
    log_alpha: Float[Tensor, " gate"], generator: torch.Generator | None = None
) -> Float[Tensor, " gate"]:
    """Hard-concrete samples in [0, 1], differentiable in log_alpha."""
    u = torch.rand(log_alpha.shape, generator=generator, device="cpu", dtype=torch.float32)
    return gates_at(log_alpha, (EPS + (1 - 2 * EPS) * u).to(log_alpha.device, non_blocking=True))


def gates_at(
    log_alpha: Float[Tensor, " gate"], u: Float[Tensor, " gate"]
) -> Float[Tensor, " gate"]:
    """The gates that these uniform numbers draw."""
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """P(z != 0) of each gate."""
    return torch.sigmoid(log_alpha - OPEN_OFFSET)


def top_gates(
    log_alpha: Float[Tensor, " gate"], ranking: Float[Tensor, " gate"], k: int
) -> Float[Tensor, " gate"]:
    """Exactly the k gates of highest ranking forward, the soft gates' gradient backward."""
    soft = open_probability(log_alpha)
    top = torch.zeros_like(soft)
    top[ranking.to(soft.device).topk(k).indices] = 1.0
    return top + soft - soft.detach()


def first_log_alpha(
    spread: tuple[float, float],
    count: int,
    scores: Float[Tensor, " gate"] | None,
    generator: torch.Generator,
) -> Float[Tensor, " gate"]:
    """Log alphas of a mean and standard deviation: ranked by scores, or at random without."""
    mean, std = spread
    if scores is None:
        return mean + std * torch.randn(count, generator=generator)
    return mean + std * rank_quantiles(scores)


def rank_quantiles(scores: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """Standard normal quantiles by rank: the scale of scores differs from method to method."""
    order = torch.argsort(scores.double(), stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return torch.special.ndtri((ranks.double() + 0.5) / len(order)).float()


def budget_shift(log_alpha: Float[Tensor, " gate"], budget: float) -> Float[Tensor, ""]:
    """The number tau for which sum P(z != 0 | log_alpha + tau) = budget, by Newton's method.

    Differentiable: as the gates' parameters move, tau keeps the sum, so its gradient is
    -p'_i / sum p' (implicit differentiation). Gradients that push all gates alike then cancel.

    Raises ValueError for a budget outside (0, n_gates).
    """
    if not 0 < budget < log_alpha.numel():
        raise ValueError(
            f"a budget of {budget} of {log_alpha.numel()} gates: expected a number above 0 and "
            "below the number of gates."
        )
    return _BudgetShift.apply(log_alpha, budget)


def _budget_shift(log_alpha: Tensor, budget: float) -> float:
    """Newton's steps, or half the bracket where they leave it."""
    least, most = torch.stack(log_alpha.aminmax()).tolist()
    low, high = -most - 60.0, -least + 60.0
    tau = (low + high) / 2
    for _ in range(200):
        p = open_probability(log_alpha + tau)
        excess, slope = torch.stack([p.sum() - budget, (p * (1 - p)).sum()]).tolist()
        if abs(excess) <= 1e-11 * budget:
            break
        low, high = (low, tau) if excess > 0 else (tau, high)
        newton = tau - excess / slope if slope > 0 else low
        following = newton if low < newton < high else (low + high) / 2
        if following == tau:
            break
        tau = following
    return tau


class _BudgetShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor, budget: float) -> Tensor:
        tau = _budget_shift(log_alpha.double(), budget)
        p = open_probability(log_alpha.double() + tau)
        slope = p * (1 - p)
        ctx.save_for_backward((slope / slope.sum()).to(log_alpha.dtype))
        return log_alpha.new_tensor(tau)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return -grad * share, None


# ---------------------------------------------------------------------------- sparsity controllers


@runtime_checkable
class Controller(Protocol):
    """How a run is made sparse: what it shifts, what it adds to the loss, what it learns."""

    def start(self, n_edges: int, budget: int | None) -> None:
        """Begin a run over `n_edges` for a circuit of `budget` edges (None: no one size)."""

    def target(self, progress: float, draw: float) -> float:
        """Edges to keep at this point of the run; `progress` and `draw` are in [0, 1)."""

    def gates(self, log_alpha: Tensor, target: float) -> Tensor:
        """The log alphas to draw gates with."""

    def penalty(self, mask: Tensor, log_alpha: Tensor, target: float) -> Tensor | float:
        """What the loss gains for the drawn mask, or for the gates that it was drawn from."""

    def learned(self) -> dict[str, Tensor]:
        """Multipliers that ascend, by name."""


@dataclass
class ExactBudget:
    """The expected number of kept edges is the budget, exactly, at every step.

    schedule: "annealed" from `start_share` of all edges down to the budget, geometrically over the
    first `anneal` of the run; "sampled", log-uniform at every step below `start_share`, down to a
    lower end that falls to `low_share` in the same way, so that one run ranks edges for circuits of
    every size; "fixed" at the budget.
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
                f"ExactBudget(schedule={self.schedule!r}) needs n_edges: a budget to aim at."
            )
        self.n_edges, self.budget = n_edges, float(budget or 0)

    def target(self, progress: float, draw: float) -> float:
        top = max(self.start_share * self.n_edges, self.budget)
        if self.schedule == "fixed":
            wanted = self.budget
        elif self.schedule == "annealed":
            wanted = self._fallen(top, self.budget, progress)
        else:
            low = max(1.0, self.low_share * self.n_edges)
            top = max(top, low)
            wanted = self._fallen(top, low, progress)
            wanted *= (top / wanted) ** draw
        return min(max(wanted, 0.5), self.n_edges - 0.5)

    def _fallen(self, top: float, end: float, progress: float) -> float:
        """Where a geometric fall from `top` to `end` is by now."""
        return top * (end / top) ** min(1.0, progress / self.anneal)

    def gates(self, log_alpha: Tensor, target: float) -> Tensor:
        return log_alpha + budget_shift(log_alpha, target)

    def penalty(self, mask: Tensor, log_alpha: Tensor, target: float) -> float:
        return 0.0

    def learned(self) -> dict[str, Tensor]:
        return {}


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name}={share}: expected a share of the run, above 0 and up to 1.")


@dataclass
class Lagrangian:
    """The paper's controller: L + lambda1 (t - s) + lambda2 (t - s)^2, the lambdas by ascent.

    s is the sparsity of the *drawn* mask, as in the published code; t rises linearly from
    `start_sparsity` to the target over the first `warmup` of the run. `target_sparsity` above 1
    pushes harder (the paper's code uses up to 1.2); by default it is that of the budget.
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
            raise ValueError("Lagrangian needs n_edges or target_sparsity: a sparsity to aim at.")
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

    def gates(self, log_alpha: Tensor, target: float) -> Tensor:
        return log_alpha

    def penalty(self, mask: Tensor, log_alpha: Tensor, target: float) -> Tensor:
        gap = (1 - target / self.n_edges) - (1 - mask.mean())
        return self.lambda1.to(mask.device) * gap + self.lambda2.to(mask.device) * gap**2

    def learned(self) -> dict[str, Tensor]:
        return {"lambda1": self.lambda1, "lambda2": self.lambda2}


@dataclass
class Penalty:
    """A fixed price on the expected share of open gates: weight * mean P(open). No target.

    probability: P(open) of a log alpha, by default the hard concrete gate's.
    """

    weight: float = 10.0
    probability: Callable[[Tensor], Tensor] = open_probability
    n_edges: int = field(default=0, init=False)

    def start(self, n_edges: int, budget: int | None) -> None:
        self.n_edges = n_edges

    def target(self, progress: float, draw: float) -> float:
        return float(self.n_edges)

    def gates(self, log_alpha: Tensor, target: float) -> Tensor:
        return log_alpha

    def penalty(self, mask: Tensor, log_alpha: Tensor, target: float) -> Tensor:
        return self.weight * self.probability(log_alpha).mean()

    def learned(self) -> dict[str, Tensor]:
        return {}
