"""Scores of the gradient methods follow their definitions, written out by brute force."""

from __future__ import annotations

from typing import Any

import brute_force as bf
import pytest
import torch
import zoo
from torch import Tensor

from tl_edgeprune import discover, models, tasks

MODEL = "bridge-gpt2"


def test_eap_is_difference_times_gradient_by_brute_force() -> None:
    """-d loss/dz at z = 1, with the gradient taken through brute-force path patching."""
    model = zoo.load(MODEL, torch.float64)
    task = zoo.pairs(model, 4)
    scores = discover(model, task, method="eap")
    expected = torch.zeros(scores.graph.n_edges, dtype=torch.float64)
    for clean, corrupted in zip(task.clean, task.corrupted, strict=True):
        mask = {
            e: torch.ones((), dtype=torch.float64, requires_grad=True) for e in scores.graph.edges
        }
        replacement = {k: v.detach() for k, v in bf.source_outputs(model, corrupted[None]).items()}
        logits = bf.masked_logits(model, clean[None], mask, replacement)[0, -1]
        (logits[3] - logits[5]).backward()
        expected += torch.stack([z.grad for z in mask.values()]) / len(task)
    torch.testing.assert_close(scores.tensor.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["eap-ig", "mask-ig"])
def test_path_methods_follow_their_definitions(method: str) -> None:
    model, steps = zoo.load(MODEL), 3
    task = zoo.pairs(model, 2)
    scores = discover(model, task, method=method, steps=steps, objective="logit-diff")
    expected = torch.zeros(scores.graph.n_edges)
    for clean, corrupted in zip(task.clean, task.corrupted, strict=True):
        for step in range(steps):
            expected += _slopes(model, clean[None], corrupted[None], method, step, steps) / steps
    torch.testing.assert_close(scores.tensor, expected / len(task), atol=2e-4, rtol=2e-3)


def _slopes(
    model: Any, clean: Tensor, corrupted: Tensor, method: str, step: int, steps: int
) -> Tensor:
    """d logit difference / d z of every edge at one point of the path, by brute force."""
    ours, theirs = (
        {k: v.detach() for k, v in bf.source_outputs(model, t).items()} for t in (clean, corrupted)
    )
    edges = bf.edges(model)
    if method == "mask-ig":
        z = {e: torch.tensor((step + 0.5) / steps, requires_grad=True) for e in edges}
        logits = bf.masked_logits(model, clean, z, theirs)[0, -1]
        (logits[3] - logits[5]).backward()
        return torch.stack([z[e].grad for e in edges])
    share, inputs = (step + 1) / steps, {}
    start = theirs["input"] + share * (ours["input"] - theirs["input"])

    def hook(resid: Tensor, hook: Any) -> Tensor:
        return start

    def read(name: str, own: Tensor) -> Tensor:
        inputs[name] = own + torch.zeros_like(own, requires_grad=True)
        inputs[name].retain_grad()
        return inputs[name]

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", hook)]):
        logits = bf.run(model, clean, read, lambda name, y: None)[0, -1]
    (logits[3] - logits[5]).backward()
    pair = [e.split("->") for e in edges]
    return torch.stack([((ours[s] - theirs[s]) * inputs[d].grad).sum() for s, d in pair])


@pytest.mark.parametrize("objective", [None, "kl"])
def test_eap_refuses_an_objective_without_a_gradient(objective: str | None) -> None:
    model = models.load("tracr-xproportion")
    task = tasks.load("tracr-xproportion", model, 8)
    with pytest.raises(ValueError, match="gradient there is zero"):
        discover(model, task, method="eap", objective=objective)


@pytest.mark.parametrize("name", ["bridge-llama-gqa", "bridge-pythia"])
def test_relevance_is_eaps_gradient_through_modules_that_follow_the_rules(name: str) -> None:
    """Norms with a detached scale and activations as x * constant, put into the model itself."""
    model = zoo.build(name)
    task = zoo.pairs(model, 2)
    scores = discover(model, task, "relp")
    before = model(task.clean[0][None])
    _follow_rules(model)
    torch.testing.assert_close(model(task.clean[0][None]), before, atol=1e-4, rtol=1e-4)
    expected = torch.zeros(scores.graph.n_edges)
    for clean, corrupted in zip(task.clean, task.corrupted, strict=True):
        mask = {e: torch.ones((), requires_grad=True) for e in scores.graph.edges}
        replacement = {k: v.detach() for k, v in bf.source_outputs(model, corrupted[None]).items()}
        logits = bf.masked_logits(model, clean[None], mask, replacement)[0, -1]
        (logits[3] - logits[5]).backward()
        expected += torch.stack([z.grad for z in mask.values()]) / len(task)
    torch.testing.assert_close(scores.tensor, expected, atol=2e-4, rtol=2e-3)


def _follow_rules(model: Any) -> None:
    """Change transformers' own modules: their forward passes stay, their gradients do not."""
    for module in model.original_model.modules():
        kind = type(module).__name__
        if (
            "Norm" in kind
            and hasattr(module, "weight")
            and not hasattr(module, "original_component")
        ):
            module.forward = _constant_division(module)
        elif kind.endswith("MLP") and hasattr(module, "gate_proj"):
            module.forward = _halved_gate(module)
        elif "act" in getattr(module, "_modules", {}):
            module.act.forward = _as_factor(module.act.forward)


def _constant_division(norm: Any) -> Any:
    centred = isinstance(norm, torch.nn.LayerNorm)
    eps = norm.eps if centred else norm.variance_epsilon

    def forward(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if centred else x
        y = x / (x.detach().square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
        return y + norm.bias if centred else y

    return forward


def _as_factor(function: Any) -> Any:
    return lambda x: x * (function(x) / x).detach()


def _halved_gate(mlp: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        gate, up = _as_factor(mlp.act_fn)(mlp.gate_proj(x)), mlp.up_proj(x)
        halved = 0.5 * (gate * up.detach() + gate.detach() * up)
        return mlp.down_proj(halved)

    return forward
