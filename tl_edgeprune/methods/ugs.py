"""Uniform gradient sampling: learn each edge's chance of being kept, from masks in between.

1. Edge k is kept with probability theta_k = sigmoid(log alpha_k). A draw is uniform in (0, 1) with
   probability w = theta (1 - theta), else 1 with theta - w/2 and 0 with 1 - theta - w/2.
2. E[d loss/d z_k | z_k uniform] estimates the loss's slope from 0 to 1. Divided by w and passed
   through the sigmoid (whose slope is w), d loss/d log alpha_k is d loss/d z_k where the draw was
   uniform, and 0 elsewhere.
3. A fixed price on the expected share of kept edges makes the circuit small.

Li and Janson 2024, "Optimal Ablation for Interpretability", section 3.2. One draw serves a batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.methods.registry import register
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.training.controllers import Penalty
from tl_edgeprune.training.pruner import EdgePruner


@register(
    "ugs",
    forwards_to=EdgePruner,
    fixed=("controller", "sampler", "init_scores", "init_log_alpha"),
    trained=True,
)
def ugs(
    model: Any,
    task: Task,
    *,
    n_edges: int | None = None,
    weight: float = 10.0,
    lr: float = 0.1,
    resume: str | Path | None = None,
    **settings: Any,
) -> EdgeScores:
    """Log alphas (log-odds of being kept) after training.

    Args:
        weight: the price of the whole graph, in nats.
        lr: learning rate of the log alphas.
        resume: a checkpoint to continue from.
        settings: EdgePruner's.
    """
    pruner = EdgePruner(
        n_edges,
        lr=lr,
        controller=Penalty(weight, torch.sigmoid),
        sampler=sample_window,
        init_scores=None,
        init_log_alpha=(1.0, 0.01),
        **settings,
    )
    return pruner.scores(model, task, "ugs", resume=resume)


def sample_window(
    log_alpha: Float[Tensor, " gate"], generator: torch.Generator
) -> Float[Tensor, " gate"]:
    """A draw of masks, 0, 1 or in between, whose gradient reaches the gates in between alone."""
    draws = torch.rand(2, *log_alpha.shape, generator=generator).to(log_alpha)
    return _Window.apply(log_alpha, *draws)


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor, draw: Tensor, inside: Tensor) -> Tensor:
        probability = torch.sigmoid(log_alpha)
        width = probability * (1 - probability)
        is_one = draw < probability - width / 2
        window = (draw < probability + width / 2) & ~is_one
        ctx.save_for_backward(window)
        return torch.where(window, inside, is_one.to(inside))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (window,) = ctx.saved_tensors
        return grad * window, None, None
