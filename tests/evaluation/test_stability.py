"""Stability: circuits over seeds and resamples, each as the method alone gives it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from support import model_zoo
from support.interrupts import stop_at_step

from tl_edgeprune import EdgePruner, discover
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.evaluation.evaluate import evaluate
from tl_edgeprune.evaluation.stability import Stability, bootstrap, stability, takes_seed
from tl_edgeprune.graph.edge_graph import EdgeGraph

MODEL = "native-ln"


def test_runs_over_seeds_are_the_methods_own():
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 2)
    found = stability(model, task, "random", size=10, seeds=(0, 1, 5))
    assert found.runs == ((0, None), (1, None), (5, None))
    for (seed, _), circuit in zip(found.runs, found.circuits, strict=True):
        assert circuit == discover(model, task, "random", seed=seed).top(10)


def test_runs_over_resamples_are_those_of_a_task_of_drawn_pairs():
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 4)
    found = stability(model, task, "mask-ig", size=7, bootstraps=3, steps=2)
    assert found.runs == ((None, 0), (None, 1), (None, 2))
    for (_, resample), circuit in zip(found.runs, found.circuits, strict=True):
        drawn = random.Random(resample).choices(range(4), k=4)
        alone = discover(model, task.subset(drawn), "mask-ig", steps=2).top(7)
        assert circuit == alone
    both = stability(model, task, "random", size=7, seeds=(0, 1), bootstraps=2)
    assert both.runs == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert both.circuits[0] == both.circuits[1] != both.circuits[2]


def test_pairs_may_come_more_than_once():
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 4)
    circuit = discover(model, task, "random").top(12)
    twice = evaluate(model, circuit, task.subset([0, 2, 2, 2]))
    one, two = (evaluate(model, circuit, task.subset([pair])) for pair in (0, 2))
    assert twice.kl == pytest.approx((one.kl + 3 * two.kl) / 4, abs=1e-6)
    assert len(bootstrap(task, 0)) == 4
    assert [t.tolist() for t in bootstrap(task, 3).clean] == [
        t.tolist() for t in bootstrap(task, 3).clean
    ]


def test_edge_pruning_takes_seeds_and_ranks_by_signed_log_alphas():
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 2)
    settings = {"steps": 2, "batch_size": 2, "progress": False}
    found = stability(model, task, "edge-pruning", size=9, seeds=(0, 1), **settings)
    alone = EdgePruner(seed=1, **settings).fit(model, task)
    assert found.circuits[1] == alone.top(9)


def circuits(*sets: set[int]) -> tuple[Circuit, ...]:
    graph = EdgeGraph(n_layers=1, n_heads=1, n_kv_heads=1)
    return tuple(
        Circuit(graph, torch.tensor([e in kept for e in range(graph.n_edges)]), {"seed": n, "a": 1})
        for n, kept in enumerate(sets)
    )


def test_figures_are_those_of_sets():
    sets = ({0, 1, 2}, {1, 2, 3}, {2, 4}, {1, 2})
    found = Stability(circuits(*sets), tuple((n, None) for n in range(4)))
    overlaps = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
    assert found.jaccard == pytest.approx(sum(overlaps) / 6)
    assert str(found).endswith(f"mean Jaccard {found.jaccard:.2f}")
    counts = [sum(edge in kept for kept in sets) for edge in range(found.graph.n_edges)]
    assert found.frequencies.tolist() == [count / 4 for count in counts]
    assert found.core() == circuits({2})[0] and found.core(0.75) == circuits({1, 2})[0]
    assert found.core(0.0) == circuits(set.union(*sets))[0]
    assert found.core().metadata == {"a": 1}


def test_which_methods_take_a_seed():
    assert takes_seed("random") and takes_seed("edge-pruning")
    assert not takes_seed("eap") and not takes_seed("mask-ig")
    with pytest.raises(ValueError, match="unknown method 'magic': expected one of acdc"):
        takes_seed("magic")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "eap"}, r"eap takes no seed: .* Give bootstraps="),
        ({"method": "eap", "bootstraps": 1}, "eap takes no seed"),
        ({"method": "random", "seeds": (3,)}, "one run of random has nothing to be compared"),
        ({"method": "random", "seeds": ()}, "one run of random"),
        ({"method": "random", "size": 10**6}, "n_edges=1000000: expected a whole number"),
    ],
)
def test_what_gives_nothing_to_compare_is_refused(settings, message):
    model = model_zoo.load(MODEL)
    with pytest.raises(ValueError, match=message):
        stability(model, model_zoo.pairs(model, 2), **{"size": 5} | settings)


def test_ctrl_c_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that Edge Pruning ends early is none of the runs."""
    model = model_zoo.load("bridge-gpt2")
    stop_at_step(monkeypatch, 2)
    settings = {"size": 20, "seeds": (0, 1), "steps": 4, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        stability(model, model_zoo.pairs(model, 4), "edge-pruning", **settings)
