"""Learnable masks: hard-concrete gates, and two ways to make them sparse (controllers.py).

1. A gate draws u ~ U(eps, 1 - eps), s = sigmoid((log u - log(1 - u) + log alpha) / beta), and is
   z = clamp(s (zeta - gamma) + gamma, 0, 1): 0 or 1 much of the time, differentiable in between.
   P(z != 0) = sigmoid(log alpha - beta log(-gamma / zeta)). (Louizos et al. 2018, equations 10 to
   12.)
2. `Lagrangian` is the paper's controller: the loss gains lambda1 (t - s) + lambda2 (t - s)^2 for
   sparsity s and target t, and the lambdas are trained by gradient ascent. (Bhaskar et al. 2024,
   section 3.)
3. `ExactBudget` shifts every log alpha by one number tau, so that the expected number of kept edges
   is the budget. Parameters then learn the ranking of edges, and no multiplier needs tuning.
"""

from __future__ import annotations

import math
from typing import Any

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
    """The gates drawn by uniform random numbers u in (0, 1)."""
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """P(z != 0) of each gate."""
    return torch.sigmoid(log_alpha - OPEN_OFFSET)


def top_gates(
    log_alpha: Float[Tensor, " gate"], ranking: Float[Tensor, " gate"], k: int
) -> Float[Tensor, " gate"]:
    """Exactly the k top gates of the ranking; their gradient is that of P(open)."""
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
    """Log alphas of this mean and standard deviation, ranked by scores or in random order."""
    mean, std = spread
    if scores is None:
        return mean + std * torch.randn(count, generator=generator)
    return mean + std * rank_quantiles(scores)


def rank_quantiles(scores: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """Standard normal quantiles by rank, since the scale of scores differs between methods."""
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
    """Newton's method, with bisection if a step leaves the bracket."""
    lowest, highest = torch.stack(log_alpha.aminmax()).tolist()
    low, high = -highest - 60.0, -lowest + 60.0
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


def mixed_seed(seed: int, step: int) -> int:
    """The seed of a step's draws in the run of this seed."""
    return (seed * 1_000_003 + step * 7_919 + 12_345) % 2**63
