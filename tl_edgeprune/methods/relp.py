"""Relevance patching: EAP with the coefficients of layer-wise relevance propagation for gradients.

1. LN-rule: a norm divides by a constant.
2. Identity-rule: an activation function is multiplication by f(x)/x, a constant.
3. Half-rule: where two numbers are multiplied (a gated MLP), each gets half the relevance.

Attention keeps its gradient, so that queries and keys get relevance. The forward pass is the
model's own to rounding; only what flows back differs.
Jafari, Eberle, Khakzar and Nanda 2025, "RelP", section 3 and table 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.attribution.mask_gradient import differentiable_at_one, path_scores, scores_of_run
from tl_edgeprune.attribution.paths import full_mask_path
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.attach import Hook, hooks_attached
from tl_edgeprune.hooks.norms import Norm, identity, norm_function
from tl_edgeprune.methods.registry import register
from tl_edgeprune.objectives import Objective, find_objective
from tl_edgeprune.runs.resume import Saved
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.tasks.task import Task

TINY = 1e-6


@register("relp", gradients=1)
def relp(
    model: Any,
    task: Task,
    *,
    objective: str | Objective | None = None,
    graph: EdgeGraph | None = None,
    positions: str | None = None,
    ablation: Ablation = "counterfactual",
    batch_size: int = 8,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EdgeScores:
    """Signed scores, one backward pass. objective: as for EAP; positions: "span" or "position" for
    edges with a mask in each. checkpoint: a file to save to every half minute; if it is there, the
    run goes on.

    Raises NotImplementedError, naming the part, for norms after attention or MLP, mixtures of
    experts, and norms or activations that the hook points do not reach.
    """
    objective = differentiable_at_one(objective, task, "RelP")
    loss_of = find_objective(objective, task)

    def relevance(run: MaskedModel, targets: Targets, saved: Saved) -> Tensor:
        how: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "saved": saved}
        with relevance_rules(run):
            return path_scores(run, targets, full_mask_path, loss_of, **how)

    metadata = {"method": "relp", "objective": objective, "ablation": ablation}
    return scores_of_run(
        relevance,
        model,
        task,
        graph=graph,
        positions=positions,
        metadata=metadata,
        batch_size=batch_size,
        checkpoint=checkpoint,
    )


@contextmanager
def relevance_rules(run: MaskedModel) -> Iterator[None]:
    """The rules on every norm and MLP of the model, for as long as the context lasts."""
    sites = run.sites
    hooks = _hooks(run.model)  # what cannot be ruled is refused before anything changes
    attention = tuple(_ruled(site, f"blocks.{i}") for i, site in enumerate(sites.attention))
    mlp = tuple(replace(s, norm=_frozen(s.norm, f"blocks.{i}")) for i, s in enumerate(sites.mlp))
    ruled_sites = replace(sites, attention=attention, mlp=mlp)
    with run.with_sites(ruled_sites), hooks_attached(run.model, hooks):
        yield


def _ruled(site: Any, where: str) -> Any:
    if site.post is not None:
        raise NotImplementedError(f"relp: {where} has a norm after attention: not supported.")
    return replace(site, norm=_frozen(site.norm, where))


def _frozen(norm: Norm, where: str) -> Norm:
    if norm is identity:
        return identity
    frozen = getattr(norm, "frozen", None)
    if frozen is None:
        raise NotImplementedError(
            f"relp: {where} has a norm of an unknown kind ({type(norm).__name__}): not supported."
        )
    return frozen


def _hooks(model: Any) -> list[Hook]:
    hooks: list[Hook] = []
    for layer, block in enumerate(model.blocks):
        name = f"blocks.{layer}"
        if hasattr(block, "ln2_post") or hasattr(block, "ln1_post"):
            raise NotImplementedError(f"relp: {name} has a norm after its parts: not supported.")
        if hasattr(block, "ln2") and hasattr(block, "mlp"):
            hooks += _norm_hooks(model, block.ln2, f"{name}.ln2")
        if hasattr(block, "mlp"):
            hooks += _mlp_hooks(model, f"{name}.mlp")
    if hasattr(model, "ln_final"):
        hooks += _norm_hooks(model, model.ln_final, "ln_final")
    return hooks


def _norm_hooks(model: Any, module: Any, name: str) -> list[Hook]:
    """A constant division: by the module's own scale, or by a frozen norm laid under its output."""
    if isinstance(module, torch.nn.Identity):
        return []
    if f"{name}.hook_out" not in model.hook_dict:  # HookedTransformer
        return [(f"{name}.hook_scale", lambda scale, hook: scale.detach())]
    norm = norm_function(module)
    if norm is identity:
        return []
    frozen = _frozen(norm, name)
    activations: dict[str, Tensor] = {}

    def before(x: Tensor, hook: Any) -> None:
        activations["x"] = x

    def after(y: Tensor, hook: Any) -> Tensor:
        return _with_gradient_of(frozen(activations.pop("x")), y)

    return [(f"{name}.hook_in", before), (f"{name}.hook_out", after)]


def _mlp_hooks(model: Any, name: str) -> list[Hook]:
    """The activation as multiplication by a constant, halved for each factor of a gated one."""
    points = model.hook_dict
    activations: dict[str, Tensor] = {}
    factors = [p for p in (f"{name}.hook_pre", f"{name}.hook_pre_linear") if p in points]
    if f"{name}.hook_post" not in points or f"{name}.hook_pre" not in points:
        raise NotImplementedError(f"relp: {name} is no plain or gated MLP: not supported.")
    if any("expert" in point for point in points if point.startswith(name)) or (
        f"{name}.hook_router_scores" in points
    ):
        raise NotImplementedError(f"relp: {name} is a mixture of experts: not supported.")

    def before(point: str) -> Callable[..., None]:
        return lambda x, hook: activations.__setitem__(point, x)

    def after(y: Tensor, hook: Any) -> Tensor:
        factors_out = [
            x * _ratio(y.detach(), x.detach()) for x in (activations.pop(p) for p in factors)
        ]
        return _with_gradient_of(sum(factors_out, torch.zeros_like(y)) / len(factors_out), y)

    return [*((p, before(p)) for p in factors), (f"{name}.hook_post", after)]


def _ratio(y: Tensor, x: Tensor) -> Tensor:
    """y / x, and 0 where x is (nearly) 0."""
    tiny = x.abs() < TINY
    return torch.where(tiny, torch.zeros_like(y), y / torch.where(tiny, torch.ones_like(x), x))


def _with_gradient_of(surrogate: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `surrogate`."""
    return surrogate + (value - surrogate).detach()
