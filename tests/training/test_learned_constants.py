"""Constants learned together with the masks: their gradient, their gain, their file, their bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import model_zoo
from support.interrupts import StopAfter

from tl_edgeprune import (
    Constants,
    EdgeGraph,
    EdgePruner,
    Optimizer,
    compare,
    discover,
    evaluate,
    masked,
)
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.objectives import kl
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.training.learned_constants import LearnedConstants

MODEL = "bridge-gpt2"
PARTS = ("inputs", "z", "mlp")


def pruner(n_edges: int | None = 60, **changes: Any) -> EdgePruner:
    settings: dict[str, Any] = {"steps": 8, "batch_size": 4, "progress": False}
    return EdgePruner(n_edges, **({"ablation": "optimal"} | settings | changes))


@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-llama-gqa", "bridge-gemma2"])
def test_masks_and_constants_have_the_gradients_of_finite_differences(name: str) -> None:
    """Both in one backward: each along a random direction of its own."""
    model = model_zoo.load(name, torch.float64)
    task = model_zoo.pairs(model, 3)
    generator = torch.Generator().manual_seed(0)
    n_edges = EdgeGraph.from_model(model).n_edges
    mask = torch.rand(n_edges, dtype=torch.float64, generator=generator).requires_grad_()
    with MaskedModel.attach(model) as run:
        target_batch = Targets(run, task, "zero").prepare(next(task.batches(2)))
        learned = LearnedConstants(run, task.corrupted, lr=0.1)

        def loss() -> torch.Tensor:
            logits = run(
                target_batch.batch.clean,
                mask,
                learned.reference(),
                target_batch.batch.read_positions,
            )
            return kl(logits, target_batch.full, target_batch.batch).sum()

        loss().backward()
        for parameter in (mask, *learned.moves):
            size = torch.randn(parameter.shape, generator=generator).abs()
            toward = size * parameter.grad.sign()  # nothing cancels
            ends = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    parameter += step * toward
                    ends.append(float(loss()))
                    parameter -= step * toward
            slope = (ends[0] - ends[1]) / 2e-3
            found = float((parameter.grad * toward).sum())
            assert found == pytest.approx(slope, rel=5e-3, abs=1e-5)


def test_they_start_at_the_means_over_the_corrupted_prompts() -> None:
    """Without a step of theirs, a run is one under mean ablation, to the bit."""
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model)
    still = pruner(optimizer=Optimizer(constants_lr=0.0)).fit(model, task)
    mean = pruner(ablation="mean").fit(model, task)
    assert still.log_alpha.equal(mean.log_alpha)
    with MaskedModel.attach(model) as run:
        means = run.reference("mean", prompts=task.corrupted)
    for part in PARTS:
        assert torch.equal(getattr(still.constants, part), getattr(means, part)[:, 0, 0])


@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-llama-gqa"])
def test_a_circuit_loses_less_under_constants_learned_with_it_than_under_means(name: str) -> None:
    model = model_zoo.load(name)
    task = model_zoo.pairs(model, 8)
    settings = {"steps": 30, "lr": 0.3, "batch_size": 8}
    learned = pruner(**settings).fit(model, task)
    means = pruner(ablation="mean", **settings).fit(model, task)
    ours = evaluate(model, learned.circuit, task, ablation=learned.constants)
    theirs = evaluate(model, means.circuit, task)
    assert ours.kl < 0.95 * theirs.kl
    assert learned.circuit.n_edges == 60


def test_they_come_back_as_an_ablation_that_can_be_kept(tmp_path: Path) -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model)
    result = pruner().fit(model, task)
    assert result.circuit.metadata["ablation"] == "optimal"
    assert result.constants.metadata == result.circuit.metadata
    path = tmp_path / "constants.safetensors"
    result.constants.save(path)
    back = Constants.load(path)
    batch = next(task.batches(2))
    with torch.no_grad():
        logits = []
        for constants in (result.constants, back):
            with masked(model, result.circuit, ablation=constants):
                logits.append(model(batch.clean))
    assert torch.equal(*logits) and not logits[0].requires_grad
    with pytest.raises(ValueError, match="as result.constants"):
        evaluate(model, result.circuit, task)
    again = pruner(ablation=back).fit(model, task)  # given ones are kept as they are
    assert again.constants is back
    assert pruner(ablation="zero").fit(model, task).constants is None


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.slow), {"accumulate": 2, "node_masks": True}],
    ids=str,
)
def test_resuming_gives_the_bits_of_a_run_never_stopped(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model, path = model_zoo.load(MODEL), tmp_path / "run.safetensors"
    task = model_zoo.pairs(model)
    whole = pruner(**settings, objective=StopAfter(10**9)).fit(model, task)
    stop = StopAfter(5)
    cut = pruner(**settings, checkpoint=path, checkpoint_every=5, objective=stop)
    stop.accumulate = cut.accumulate
    assert len(cut.fit(model, task).history) == 5
    stop.left = 10**9
    rest = cut.fit(model, task, resume=path)
    assert rest.finished and rest.log_alpha.equal(whole.log_alpha)
    for part in PARTS:
        assert torch.equal(getattr(rest.constants, part), getattr(whole.constants, part))
        assert getattr(rest.constants, part).abs().sum() > 0


def test_in_bfloat16_small_moves_are_not_lost() -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model)
    slow = Optimizer(constants_lr=1e-4)
    result = pruner(dtype=torch.bfloat16, optimizer=slow).fit(model, task)
    assert result.constants.mlp.dtype == torch.float32
    rounded = result.constants.mlp.bfloat16().float()
    assert not torch.equal(result.constants.mlp, rounded)
    single = pruner(optimizer=slow).fit(model, task).constants
    kinds = ("mean", result.constants, single)
    mean, mine, theirs = (evaluate(model, result.circuit, task, ablation=k).kl for k in kinds)
    assert mine < mean - 1e-3 and mine == pytest.approx(theirs, rel=5e-3)


def test_only_a_run_that_gives_them_back_may_learn_them() -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model)
    for method, settings in (("edge-pruning", {}), ("eap", {}), ("acdc", {"threshold": 0.1})):
        with pytest.raises(ValueError, match="ablation='optimal' needs the constants"):
            discover(model, task, method, ablation="optimal", **settings)
    with pytest.raises(ValueError, match="ablation='optimal' needs the constants"):
        compare(model, task, task, methods=["edge-pruning"], sizes=[20], ablation="optimal")
    with pytest.raises(ValueError, match="unknown ablation 'best': expected one of counterfact"):
        EdgePruner(20, ablation="best")
