"""Circuits that are known: training recovers exactly the edges that cutting one by one finds.

The settings are those of benchmarks/tracr.py, the same for both programs and both ablations. The
prompts and the seed are all that a run is given beside the circuit's size.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tl_edgeprune import models, tasks
from tl_edgeprune.circuit import Circuit
from tl_edgeprune.graph import EdgeGraph
from tl_edgeprune.masked import masked

NAMES = ("tracr-xproportion", "tracr-reverse")
CASES = [(name, ablation) for name in NAMES for ablation in ("zero", "counterfactual")]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "tracr.py"
    spec = importlib.util.spec_from_file_location("benchmarks_tracr", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def error(model, name: str, mask: torch.Tensor, ablation: str, n: int = 60) -> float:
    """Mean squared error at all positions but BOS, over prompts of every length."""
    total = count = 0
    for batch in tasks.load(name, model, n, seed=7).batches(32):
        other = {"corrupted": batch.corrupted} if ablation == "counterfactual" else {}
        with torch.no_grad():
            full = model(batch.clean)
            with masked(model, mask, ablation=ablation, **other):
                difference = (model(batch.clean) - full)[:, 1:]
        total, count = total + float(difference.square().sum()), count + difference.numel()
    return total / count


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 5))]
)
@pytest.mark.parametrize(("name", "ablation"), CASES)
def test_training_recovers_the_known_circuit_exactly(benchmark, name, ablation, seed):
    result = benchmark.prune(models.load(name, device="cpu"), name, ablation, seed)
    assert set(result.circuit.edges) == models.known_circuit(name, ablation)


@pytest.mark.parametrize(("name", "ablation"), CASES)
def test_cutting_edges_alone_finds_the_known_circuit(name, ablation):
    """Both ways: from the full model (only what it then notices) and from the circuit (all of
    it).
    """
    model = models.load(name, device="cpu")
    graph = EdgeGraph.from_model(model)
    known = Circuit.from_edges(graph, models.known_circuit(name, ablation)).mask.float()

    def raises_the_error(kept: torch.Tensor, edge: int) -> bool:
        cut = kept.clone()
        cut[edge] = 0
        return error(model, name, cut, ablation) > 1e-8

    assert error(model, name, known, ablation) < 1e-12
    whole = torch.ones(graph.n_edges)
    needed = [edge for edge in range(graph.n_edges) if raises_the_error(whole, edge)]
    assert needed == known.nonzero().flatten().tolist()
    assert all(raises_the_error(known, edge) for edge in needed)


@pytest.mark.parametrize("name", NAMES)
def test_a_circuit_of_one_ablation_is_none_of_the_other(name):
    """Under zero ablation what all prompts share must be kept too."""
    model = models.load(name, device="cpu")
    few = Circuit.from_edges(
        EdgeGraph.from_model(model), models.known_circuit(name, "counterfactual")
    )
    assert error(model, name, few.mask, "counterfactual") < 1e-12
    assert error(model, name, few.mask, "zero") > 1e-3
