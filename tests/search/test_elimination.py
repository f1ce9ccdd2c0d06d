"""Backward elimination, held to textbook elimination by whole runs of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import model_zoo
from torch import Tensor

from tl_edgeprune import Circuit, EdgeGraph, EdgeScores, discover, eliminate, evaluate
from tl_edgeprune.ablation.kinds import ABLATIONS
from tl_edgeprune.evaluation.evaluate import evaluate_all
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.reachability import leading_edges
from tl_edgeprune.objectives import kl
from tl_edgeprune.runs import resume as saved_state
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.search.cuts import find_cuts
from tl_edgeprune.search.edge_effects import edge_effects
from tl_edgeprune.search.full_cuts import FullCuts

MODELS = ("bridge-gpt2", "bridge-llama-gqa")
ONE_QUICK = (MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow))


def some_scores(name: str, seed: int = 0) -> EdgeScores:
    graph = EdgeGraph.from_model(model_zoo.load(name))
    generator = torch.Generator().manual_seed(seed)
    return EdgeScores(graph, torch.randn(graph.n_edges, generator=generator), {}, False)


def by_definition(model: Any, task: Any, mask: Tensor, graph: EdgeGraph, stop: int) -> list[Tensor]:
    """The circuits that are left when, again and again, the edge goes whose cut leaves the lowest
    KL, and with it what leads nowhere.
    """
    left = [mask]
    while int(mask.sum()) > stop:
        without = mask.repeat(int(mask.sum()), 1)
        without[range(len(without)), mask.nonzero().flatten()] = False
        found = evaluate_all(model, [Circuit(graph, cut) for cut in without], task)
        kls = torch.tensor([each.kl for each in found])
        mask = Circuit(graph, without[kls.argmin()]).without_dead_edges().mask
        left.append(mask)
    return left


@pytest.mark.parametrize("name", ONE_QUICK)
def test_one_edge_at_a_time_is_textbook_elimination(name: str, monkeypatch) -> None:
    model, task = model_zoo.load(name), model_zoo.pairs(model_zoo.load(name), 5)
    graph = EdgeGraph.from_model(model)
    scores = discover(model, task, method="eap", objective="logit-diff")
    first = scores.greedy(20, alive=True)
    assert first.n_edges >= 10
    scores = EdgeScores(graph, 1 + scores.ranking() * first.mask, {}, False)
    fewest_cuts = "tl_edgeprune.search.elimination.MIN_CUT"  # all, in each round
    monkeypatch.setattr(fewest_cuts, graph.n_edges)
    found = eliminate(model, task, scores, start=first.n_edges, stop=2, share=0.01)
    expected = by_definition(model, task, first.mask, graph, 2)
    assert len(expected) >= 5
    for mask in expected:
        if mask.any():
            assert found.top(int(mask.sum())).mask.equal(mask)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ["whole", "fastest"])
def test_edge_effects_are_what_the_model_does_without_the_edge(name: str, engine: str) -> None:
    model, task = model_zoo.load(name), model_zoo.pairs(model_zoo.load(name), 5)
    graph = EdgeGraph.from_model(model)
    mask = some_scores(name).top(graph.n_edges // 2).mask
    with MaskedModel.attach(model, graph) as run:
        targets = Targets(run, task)
        target_batches = [targets.prepare(batch) for batch in task.batches(2)]
        cuts = FullCuts(run, target_batches, kl)
        if engine == "fastest":
            cuts = find_cuts(run, targets, kl, batch_size=2)
        cuts.set(mask)
        edges = mask.nonzero().flatten()[::9]
        rises = edge_effects(cuts, edges)
    before = evaluate(model, Circuit(graph, mask), task).kl
    for edge, rise in zip(edges.tolist(), rises.tolist(), strict=True):
        cut = mask.clone()
        cut[edge] = False
        assert before + rise == pytest.approx(
            evaluate(model, Circuit(graph, cut), task).kl, rel=1e-3, abs=1e-5
        )


@given(st.integers(0, 99), st.integers(3, 40), st.floats(0.05, 1.0))
@settings(max_examples=8)
def test_all_but_the_highest_edges_stay_as_they_were(seed: int, start: int, share: float) -> None:
    model, scores = model_zoo.load("bridge-gpt2"), some_scores("bridge-gpt2", seed)
    task, stop = model_zoo.pairs(model, 3), max(1, start // 2)
    found = eliminate(model, task, scores, start=start, stop=stop, share=share)
    assert found.top(start) == scores.top(start)
    larger = start + 17
    assert found.top(larger) == scores.top(larger)
    assert sorted(found.tensor.tolist()) == list(range(scores.graph.n_edges))
    assert found.tensor.equal(
        eliminate(model, task, scores, start=start, stop=stop, share=share).tensor
    )
    smallest = found.top(stop)
    assert smallest.without_dead_edges().n_edges == smallest.n_edges or (
        scores.top(start).without_dead_edges().n_edges < stop
    )


@pytest.mark.parametrize("name", ONE_QUICK)
def test_small_circuits_are_better_than_the_ranking_s_own(name: str) -> None:
    model = model_zoo.load(name)
    task, others = model_zoo.pairs(model, 16).split(0.5)
    scores = discover(model, task, method="eap", objective="logit-diff")
    found = eliminate(model, task, scores, start=120, stop=20)
    sizes = (20, 40, 60)
    for pairs, at_most in ((task, 0.95), (others, 1.0)):
        ours, theirs = (
            sum(each.kl for each in evaluate_all(model, [*map(s.top, sizes)], pairs))
            for s in (found, scores)
        )
        assert ours < at_most * theirs
    note = found.metadata["eliminated"]
    assert note["pairs"] == 8 and note["start"] == 120 and note["stop"] == 20
    assert note["before"] == pytest.approx(evaluate(model, scores.top(120), task).kl, rel=1e-3)
    assert note["after"] == pytest.approx(evaluate(model, found.top(20), task).kl, rel=1e-3)
    assert found.metadata["method"] == "eap" and not found.by_magnitude


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_edges_that_no_input_reaches_go_only_where_they_carry_nothing(ablation: str) -> None:
    """An MLP without its own edges writes what it does on corrupted prompts, but not zero or a
    mean: its edge to the logits goes when it is the least needed, and not before.
    """
    model, task = model_zoo.load("bridge-gpt2"), model_zoo.pairs(model_zoo.load("bridge-gpt2"), 3)
    graph = EdgeGraph.from_model(model)
    left = [f"{source}->logits" for source in ("input", "m0", "m1", "m2")]
    ranking = Circuit.from_edges(graph, left).mask.float()
    found = eliminate(
        model, task, EdgeScores(graph, ranking, {}, False), start=4, stop=1, ablation=ablation
    )
    while len(left) > 1:
        smaller = [[edge for edge in left if edge != gone] for gone in left]
        circuits = [Circuit.from_edges(graph, edges) for edges in smaller]
        kls = [each.kl for each in evaluate_all(model, circuits, task, ablation=ablation)]
        ours = found.top(len(left) - 1)
        assert kls[circuits.index(ours)] == pytest.approx(min(kls), rel=1e-5)
        left = list(ours.edges)
    assert found.metadata["eliminated"]["after"] == pytest.approx(min(kls), rel=1e-5)


@given(st.integers(0, 99), st.sampled_from(sorted(ABLATIONS)))
@settings(max_examples=5)
def test_edges_that_lead_nowhere_carry_nothing(seed: int, ablation: str) -> None:
    model, scores = model_zoo.load("bridge-gpt2"), some_scores("bridge-gpt2", seed)
    kept = scores.top(60).mask
    leads = leading_edges(scores.graph, kept)
    assert not bool((scores.top(60, alive=True).mask & ~leads).any())
    both = [Circuit(scores.graph, mask) for mask in (kept, kept & leads)]
    whole, rest = evaluate_all(model, both, model_zoo.pairs(model, 2), ablation=ablation)
    assert whole.kl == pytest.approx(rest.kl, rel=1e-5)


@pytest.mark.slow
def test_edges_that_stand_in_for_one_another_do_not_go_together() -> None:
    """The whole of a small model's edges, half of which may go at once: rounds that cost more than
    single cuts tell are halved.
    """
    model = model_zoo.load("bridge-gpt2")
    task, scores = model_zoo.pairs(model, 6), some_scores("bridge-gpt2")
    start = scores.graph.n_edges - 1
    coarse = eliminate(model, task, scores, start=start, stop=60, share=0.5)
    blind = EdgeScores(scores.graph, singles_alone(model, task, scores.top(start)), {}, False)
    for size in (60, 120):
        assert (
            evaluate(model, coarse.top(size), task).kl < evaluate(model, blind.top(size), task).kl
        )


def singles_alone(model: Any, task: Any, circuit: Circuit) -> Tensor:
    """Every edge ranked by its own cut from the circuit."""
    ranks = torch.full((circuit.graph.n_edges,), -1e9)
    with MaskedModel.attach(model, circuit.graph) as run:
        cuts = find_cuts(run, Targets(run, task), kl)
        cuts.set(circuit.mask)
        edges = circuit.mask.nonzero().flatten()
        ranks[edges] = edge_effects(cuts, edges).float()
    return ranks


def test_a_stopped_run_goes_on_to_the_same_ranking(tmp_path, monkeypatch) -> None:
    model, scores = model_zoo.load("bridge-gpt2"), some_scores("bridge-gpt2")
    task, file = model_zoo.pairs(model, 4), tmp_path / "state.safetensors"
    sizes = {"start": 60, "stop": 10}
    whole = eliminate(model, task, scores, **sizes)
    monkeypatch.setattr(saved_state, "SAVE_SECONDS", 0.0)
    rounds = []

    def stopped(cuts: Any, edges: Tensor) -> Tensor:
        rounds.append(len(edges))
        if len(rounds) == 6:
            raise KeyboardInterrupt
        return edge_effects(cuts, edges)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tl_edgeprune.search.elimination.edge_effects", stopped)
        eliminate(model, task, scores, **sizes, checkpoint=file)
    monkeypatch.setattr("tl_edgeprune.search.elimination.edge_effects", counted := Counted())
    again = eliminate(model, task, scores, **sizes, checkpoint=file)
    assert again.tensor.equal(whole.tensor)
    rest = counted.calls
    monkeypatch.setattr("tl_edgeprune.search.elimination.edge_effects", counted := Counted())
    eliminate(model, task, scores, **sizes)
    assert rest == counted.calls - 5
    with pytest.raises(ValueError, match="is of another run"):
        eliminate(model, task, scores, start=60, stop=9, checkpoint=file)


class Counted:
    """`edge_effects`, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, cuts: Any, edges: Tensor) -> Tensor:
        self.calls += 1
        return edge_effects(cuts, edges)


def test_wrong_input_is_refused_before_any_run() -> None:
    model, scores = model_zoo.load("bridge-gpt2"), some_scores("bridge-gpt2")
    task, most = model_zoo.pairs(model, 2), scores.graph.n_edges
    for start, stop in ((10, 10), (10, 0), (most, 5), (5, 10)):
        with pytest.raises(ValueError, match=f"start={start}, stop={stop}: expected sizes"):
            eliminate(model, task, scores, start=start, stop=stop)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"share={share}: expected a share"):
            eliminate(model, task, scores, start=10, stop=5, share=share)
    other = some_scores("bridge-llama-gqa")
    with pytest.raises(ValueError, match="graph"):
        eliminate(model, task, other, start=10, stop=5)
