"""Blocks recomputed in backward: the same logits and gradients, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masked import marks, prompts, random_mask
from torch import Tensor

from tl_edgeprune import EdgeGraph
from tl_edgeprune.masked import Held, MaskedModel
from tl_edgeprune.recompute import RecomputedModel

NAMES = [
    pytest.param(name, id=name, marks=marks(name, torch.float64)) for name in zoo.ARCHITECTURES
]
few = settings(max_examples=settings.default.max_examples // 4)


def gradients(
    kind: type[MaskedModel], model: Any, graph: EdgeGraph, mask: Tensor, ablation: str, **given: Any
) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a number that all of them decide."""
    clean, corrupted = zoo.tokens(model), zoo.tokens(model, seed=1)
    mask = mask.clone().requires_grad_()
    with kind.attach(model, graph) as run:
        reference = run.reference(ablation, corrupted=corrupted, prompts=prompts(model))
        logits = run(clean, mask, reference, **given)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
        (grad,) = torch.autograd.grad((logits * weights).sum(), mask)
    return logits.detach(), grad


@pytest.mark.parametrize("name", NAMES)
@few
@given(
    seed=st.integers(0, 2**16),
    ablation=st.sampled_from(["counterfactual", "zero", "mean-positional"]),
    positions=st.sampled_from([None, torch.tensor([[6], [6]]), torch.tensor([[2, 5], [3, 3]])]),
)
def test_gradients_are_those_without_recomputation(
    name: str, seed: int, ablation: str, positions: Tensor | None
) -> None:
    model = zoo.load(name)
    graph = EdgeGraph.from_model(model)
    mask = random_mask(model, graph, seed).float()
    both = [
        gradients(kind, model, graph, mask, ablation, positions=positions)
        for kind in (MaskedModel, RecomputedModel)
    ]
    for theirs, mine in zip(*both, strict=True):
        error = float((mine - theirs).norm() / theirs.norm())
        assert error < 2e-5, error
