"""Learned constants: their gradient, what they gain, where they may be used, their file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import model_zoo

from tl_edgeprune import EdgeGraph, EdgePruner, discover, masked
from tl_edgeprune.ablation.constants import Constants
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.methods.random_scores import random_scores
from tl_edgeprune.objectives import kl
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.training.optimal_constants import optimal_constants

MODEL = "bridge-gpt2"
PARTS = ("inputs", "z", "mlp")


def learn(model, task, circuit=None, **changes) -> Constants:
    return optimal_constants(model, task, circuit, **({"progress": False, "steps": 30} | changes))


def loss_under(model, task, circuit, ablation) -> float:
    """Mean KL of the circuit by `masked` itself."""
    losses = []
    for batch in task.batches(8):
        with torch.no_grad():
            full = model(batch.clean)
            prompts = task.clean if ablation == "mean" else None
            with masked(model, circuit, ablation=ablation, prompts=prompts):
                own = model(batch.clean)
        losses.append(kl(own[:, -1:], full[:, -1:], batch))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize(
    "name", ["bridge-gpt2", "bridge-llama-gqa", "bridge-pythia", "bridge-gemma2"]
)
def test_the_constants_gradient_is_that_of_finite_differences(name: str) -> None:
    model = model_zoo.load(name, torch.float64)
    task = model_zoo.pairs(model, 3)
    graph = EdgeGraph.from_model(model)
    mask = torch.rand(graph.n_edges, dtype=torch.float64)
    start = learn(model, task, steps=1)
    parts = {p: getattr(start, p).double().requires_grad_() for p in PARTS}
    with MaskedModel.attach(model) as run:
        target_batch = Targets(run, task, "zero").prepare(next(task.batches(2)))

        def loss(constants: Constants) -> torch.Tensor:
            reference = constants.reference(run.sites, graph)
            logits = run(
                target_batch.batch.clean, mask, reference, target_batch.batch.read_positions
            )
            return kl(logits, target_batch.full, target_batch.batch).sum()

        constants = replace(start, **parts)
        grads = torch.autograd.grad(loss(constants), list(parts.values()), allow_unused=True)
        for part, grad in zip(PARTS, grads, strict=True):
            toward = torch.randn_like(parts[part]).abs() * grad.sign()  # nothing cancels
            with torch.no_grad():
                up, down = (
                    loss(replace(constants, **{part: parts[part] + step * toward}))
                    for step in (1e-3, -1e-3)
                )
            # transformers' RMS norms round to float32: no smaller step can be taken
            slope = float((up - down) / 2e-3)
            assert float((grad * toward).sum()) == pytest.approx(slope, rel=5e-3, abs=1e-5)


def test_learned_constants_hurt_less_than_means() -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 8)
    circuit = random_scores(model, task).top(60)
    learned = learn(model, task, circuit, steps=60)
    assert loss_under(model, task, circuit, learned) < 0.8 * loss_under(
        model, task, circuit, "mean"
    )
    assert str(learned) == "optimal" and learned.metadata["task"] == "random"


def test_constants_for_any_circuit_help_one_never_seen() -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 8)
    circuit = random_scores(model, task, seed=5).top(150)
    learned = learn(model, task, steps=80)
    assert loss_under(model, task, circuit, learned) < loss_under(model, task, circuit, "mean")


def test_constants_are_an_ablation_for_methods_and_pruning() -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 6)
    learned = learn(model, task, steps=3)
    scores = discover(model, task, "eap", ablation=learned)
    assert scores.metadata["ablation"] == "optimal"
    result = EdgePruner(20, steps=4, batch_size=4, ablation=learned, progress=False).fit(
        model, task
    )
    assert result.circuit.metadata["ablation"] == "optimal"


def test_a_file_of_constants_comes_back_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    model = model_zoo.load(MODEL)
    learned = learn(model, model_zoo.pairs(model, 4), steps=2)
    path = tmp_path / "constants.safetensors"
    learned.save(path)
    back = Constants.load(path)
    assert all(torch.equal(getattr(back, p), getattr(learned, p)) for p in PARTS)
    assert (back.graph, back.metadata) == (learned.graph, learned.metadata)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="damaged"):
        Constants.load(path)


def test_wrong_use_is_refused() -> None:
    model, other = model_zoo.load(MODEL), model_zoo.load("bridge-llama-gqa")
    task = model_zoo.pairs(model, 4)
    learned = learn(model, task, steps=1)
    with pytest.raises(ValueError, match="needs the constants"):
        discover(model, task, "eap", ablation="optimal")
    with pytest.raises(ValueError, match="another graph"):
        discover(other, model_zoo.pairs(other, 4), "eap", ablation=learned)
    with pytest.raises(ValueError, match="steps=0"):
        learn(model, task, steps=0)
