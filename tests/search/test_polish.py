"""Exchanges of edges, judged by runs of the model itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import model_zoo
from torch import Tensor

from tl_edgeprune import Circuit, EdgeGraph, EdgeScores, discover, eliminate, evaluate
from tl_edgeprune.search.polish import exchange_edges, polish


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 999))
def test_an_exchange_keeps_the_size_and_takes_the_best(n: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    guess = torch.randn(n, generator=generator)
    mask = torch.rand(n, generator=generator) < 0.5
    other = exchange_edges(mask, guess, count)
    assert other.sum() == mask.sum()
    gone, come = mask & ~other, other & ~mask
    assert gone.sum() == come.sum() <= count
    if come.any():
        assert guess[come].min() > guess[gone].max()
    # Nothing better was left out: by definition, over all pairs of a kept and another edge.
    pairs = sorted(
        zip(guess[mask].sort().values, guess[~mask].sort(descending=True).values, strict=False)
    )
    worth = sum(bool(high > low) for low, high in pairs)
    assert int(come.sum()) == min(worth, count)


@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-llama-gqa"])
def test_a_polished_circuit_is_better_and_as_large(name: str) -> None:
    model, task = model_zoo.load(name), model_zoo.pairs(model_zoo.load(name), 6)
    circuit = discover(model, task, method="eap", objective="logit-diff").top(40)
    better = polish(model, task, circuit, rounds=12, swap=0.2)
    before, after = (evaluate(model, c, task).kl for c in (circuit, better))
    assert better.n_edges == 40
    assert after < 0.9 * before
    note = better.metadata["polish"]
    assert note["before"] == pytest.approx(before, rel=1e-4)
    assert note["after"] == pytest.approx(after, rel=1e-4)
    assert note["exchanged"] == int((better.mask & ~circuit.mask).sum()) > 0


def test_other_pairs_can_judge_the_exchanges() -> None:
    model = model_zoo.load("bridge-gpt2")
    task, others = model_zoo.pairs(model, 10).split(0.6)
    circuit = discover(model, task, method="eap", objective="logit-diff").top(40)
    better = polish(model, task, circuit, rounds=12, swap=0.2, held_out=others)
    before, after = (evaluate(model, c, others).kl for c in (circuit, better))
    assert better.metadata["polish"]["after"] == pytest.approx(after, rel=1e-4)
    assert better.n_edges == 40 and after < before
    assert better != polish(model, task, circuit, rounds=12, swap=0.2)


def test_pairs_that_cannot_judge_the_objective_are_refused() -> None:
    """Without a distractor a logit difference would be the sum over nothing, and nothing move."""
    model = model_zoo.load("bridge-gpt2")
    task, others = model_zoo.pairs(model, 6).split(0.5)
    nothing = [torch.zeros(0, dtype=torch.long)] * len(others)
    graph = EdgeGraph.from_model(model)
    circuit = Circuit(graph, torch.arange(graph.n_edges) < 9)
    bare = replace(others, distractors=nothing)
    with pytest.raises(ValueError, match="one answer token and one distractor token"):
        polish(model, task, circuit, held_out=bare, objective="logit-diff")
    task = replace(task, objective="log-prob")
    bare = replace(bare, answers=nothing, objective="kl")
    with pytest.raises(ValueError, match="'log-prob': pair 0 of task 'random' has no answer"):
        polish(model, task, circuit, held_out=bare)


@pytest.mark.parametrize("worth", [3, 0])
def test_no_round_tries_an_exchange_again(worth: int, monkeypatch) -> None:
    """Of the edges asked for only some are worth exchanging, and no exchange helps."""
    model = model_zoo.load("bridge-gpt2")
    task, graph = model_zoo.pairs(model, 2), EdgeGraph.from_model(model)
    mask = torch.arange(graph.n_edges) < 40
    guess = mask.float() - 2 * (torch.arange(graph.n_edges) < worth).float()
    tried: list[int] = []

    def loss(run: Any, targets: Any, other: Tensor, *rest: Any) -> float:
        tried.append(int((other & ~mask).sum()))
        return 0.0

    module = sys.modules["tl_edgeprune.search.polish"]  # the package's own name is the function
    monkeypatch.setattr(module, "path_scores", lambda *_, **__: guess)
    monkeypatch.setattr(module, "_mean_loss", loss)
    polish(model, task, Circuit(graph, mask), swap=1.0)
    assert tried == ([0, 3, 2, 1] if worth else [0])


def test_what_was_found_on_folded_weights_is_refused_on_others() -> None:
    model = model_zoo.load("bridge-gpt2")
    task, graph = model_zoo.pairs(model, 2), EdgeGraph.from_model(model)
    origin = {"ablation": "zero", "folded": True}
    scores = EdgeScores(graph, torch.arange(graph.n_edges).float(), origin)
    with pytest.raises(ValueError, match="found under zero ablation on a model with folded"):
        polish(model, task, scores.top(9))
    with pytest.raises(ValueError, match="found under zero ablation on a model with folded"):
        eliminate(model, task, scores, start=9, stop=3)


def test_wrong_input_is_refused() -> None:
    model = model_zoo.load("bridge-gpt2")
    task, graph = model_zoo.pairs(model, 2), EdgeGraph.from_model(model)
    some = torch.arange(graph.n_edges) < 5
    with pytest.raises(ValueError, match="swap=0.0: expected a share of the circuit's edges"):
        polish(model, task, Circuit(graph, some), swap=0.0)
    with pytest.raises(ValueError, match="rounds=0: expected 1 or more"):
        polish(model, task, Circuit(graph, some), rounds=0)
    with pytest.raises(ValueError, match=f"the circuit has {graph.n_edges} of {graph.n_edges}"):
        polish(model, task, Circuit(graph, torch.ones_like(some)))


def test_a_circuit_is_told_by_the_ablation_that_it_was_polished_under():
    model = model_zoo.load("bridge-gpt2")
    task, graph = model_zoo.pairs(model, 2), EdgeGraph.from_model(model)
    noise = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(0))
    circuit = Circuit.top(graph, noise, 60, ablation="counterfactual")
    found = polish(model, task, circuit, rounds=1, ablation="zero")
    assert found.metadata["ablation"] == "zero"
    assert polish(model, task, circuit, rounds=1).metadata["ablation"] == "counterfactual"
