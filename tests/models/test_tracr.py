"""Circuits that are known: training recovers exactly the edges that cutting one by one finds.

The settings are those of benchmarks/tracr.py, the same for both programs and both ablations. The
prompts, the seed and the circuit's size are all that a run is given.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tl_edgeprune import Circuit, EdgeGraph, masked, models, tasks
from tl_edgeprune.models import tracr

NAMES = ("tracr-xproportion", "tracr-reverse")
CASES = [(name, ablation) for name in NAMES for ablation in ("zero", "counterfactual")]
SLOW = pytest.mark.slow
QUICK_CASES = (("tracr-reverse", "zero"), ("tracr-xproportion", "counterfactual"))
SOME_CASES = [pytest.param(*case, marks=[SLOW] * (case not in QUICK_CASES)) for case in CASES]
SEEDS = [0, *(pytest.param(seed, marks=SLOW) for seed in range(1, 5))]
QUICK = [("tracr-hist", "counterfactual")]
UNSOLVED = ("tracr-shuffle-dyck", "zero")  # 23 of its 24 edges
OTHERS = [
    (name, ablation) if (name, ablation) in QUICK else pytest.param(name, ablation, marks=SLOW)
    for name in tracr.NAMES[2:]
    for ablation in ("zero", "counterfactual")
    if models.known_circuit(name, ablation)  # of length under counterfactual ablation: none
]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "tracr.py"
    spec = importlib.util.spec_from_file_location("benchmarks_tracr", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def errors(model: Any, name: str, masks: Tensor, ablation: str) -> Tensor:
    """Mean squared error under each mask [mask, edge], at all positions but BOS, over all
    lengths.
    """
    total, count = torch.zeros(len(masks), dtype=torch.float64), 0
    for batch in tasks.load(name, model, 24, seed=7).batches(16):
        other = {"corrupted": batch.corrupted} if ablation == "counterfactual" else {}
        mask = torch.ones(masks.shape[1])
        with torch.no_grad():
            full = model(batch.clean)
            with masked(model, mask, ablation=ablation, **other):
                for row, wanted in enumerate(masks):
                    mask.copy_(wanted)
                    total[row] += (model(batch.clean) - full)[:, 1:].double().square().sum()
        count += full[:, 1:].numel()
    return total / count


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "ablation"), SOME_CASES)
def test_training_recovers_the_known_circuit_exactly(benchmark, name, ablation, seed):
    result = benchmark.prune(models.load(name, device="cpu"), name, ablation, seed)
    assert set(result.circuit.edges) == models.known_circuit(name, ablation)


@pytest.mark.parametrize(("name", "ablation"), OTHERS)
def test_training_recovers_what_cutting_one_by_one_finds(benchmark, name, ablation):
    """Exactly, but for one edge of the largest program's under zero ablation."""
    found = benchmark.prune(models.load(name, device="cpu"), name, ablation, 0).circuit
    missed = models.known_circuit(name, ablation) - set(found.edges)
    assert len(missed) <= ((name, ablation) == UNSOLVED)


@pytest.mark.parametrize(("name", "ablation"), SOME_CASES)
def test_cutting_edges_alone_finds_the_known_circuit(name, ablation):
    """From the full model as from the circuit alone: each of its edges is needed, no other is."""
    model = models.load(name, device="cpu")
    graph = EdgeGraph.from_model(model)
    known = Circuit.from_edges(graph, models.known_circuit(name, ablation)).mask
    cuts = 1 - torch.eye(graph.n_edges)  # [cut, edge]
    assert torch.equal(errors(model, name, cuts, ablation) > 1e-8, known)
    alone = errors(model, name, torch.cat([known[None], known * cuts[known]]), ablation)
    assert alone[0] < 1e-12
    assert bool((alone[1:] > 1e-8).all())


@pytest.mark.parametrize("name", NAMES)
def test_under_zero_ablation_more_edges_are_needed(name):
    """What all prompts share is in every corrupted run too, but not in nothing."""
    model = models.load(name, device="cpu")
    edges = models.known_circuit(name, "counterfactual")
    few = Circuit.from_edges(EdgeGraph.from_model(model), edges).mask.float()[None]
    assert errors(model, name, few, "counterfactual")[0] < 1e-12
    assert errors(model, name, few, "zero")[0] > 1e-3
