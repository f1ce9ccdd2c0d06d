"""Faithfulness curves: areas by hand, circuits one by one, MIB's count of edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import model_zoo

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.evaluation.evaluate import evaluate
from tl_edgeprune.evaluation.faithfulness import (
    MIB_SHARES,
    FaithfulnessCurve,
    area,
    edge_counts,
    faithfulness_curve,
    mib_faithfulness,
    top_masks,
)
from tl_edgeprune.graph.edge_graph import EdgeGraph

GROUPED = EdgeGraph(n_layers=2, n_heads=4, n_kv_heads=2)


def random_scores(graph: EdgeGraph, seed: int = 0) -> EdgeScores:
    generator = torch.Generator().manual_seed(seed)
    return EdgeScores(graph, torch.randn(graph.n_edges, generator=generator))


def curve_of(values: list[float]) -> FaithfulnessCurve:
    return FaithfulnessCurve(MIB_SHARES, (0,) * 10, tuple(map(float, values)), 1.0, 0.0)


# --------------------------------------------------------------------------------- areas


def test_areas_of_a_curve_by_hand():
    """0 up to a tenth of the edges, then straight to 0.5 at 0.2, 1.5 at 0.5, 1 at the end."""
    curve = curve_of([0, 0, 0, 0, 0, 0, 0, 0.5, 1.5, 1])
    assert curve.cpr == pytest.approx(0.1 * 0.25 + 0.3 * 1.0 + 0.5 * 1.25)
    assert curve.cmd == pytest.approx(0.099 + 0.1 * 0.75 + 0.3 * 0.5 + 0.5 * 0.25)


def test_a_perfect_ranking_misses_only_what_lies_below_the_first_share():
    curve = curve_of([1.0] * 10)
    assert curve.cpr == pytest.approx(0.999) and curve.cmd == 0


@given(st.lists(st.floats(-2, 3), min_size=10, max_size=10))
def test_areas_are_sums_of_trapezoids(values):
    cpr = cmd = 0.0
    for place in range(9):
        width = MIB_SHARES[place + 1] - MIB_SHARES[place]
        cpr += width * (values[place] + values[place + 1]) / 2
        cmd += width * (abs(1 - values[place]) + abs(1 - values[place + 1])) / 2
    assert curve_of(values).cpr == pytest.approx(cpr, abs=1e-12)
    assert curve_of(values).cmd == pytest.approx(cmd, abs=1e-12)
    assert area([0.5], values[:1]) == 0


# --------------------------------------------------------------------------------- counts


def test_mib_counts_the_edges_of_a_model_whose_heads_share_nothing():
    counts = edge_counts(GROUPED, "mib")
    apart = EdgeGraph(n_layers=2, n_heads=4, n_kv_heads=4)
    assert int(counts.sum()) == apart.n_edges
    assert counts[GROUPED.index("input->a1.kv0<k>")] == 2
    assert counts[GROUPED.index("input->a1.h0<q>")] == counts[GROUPED.index("m0->logits")] == 1
    assert torch.equal(edge_counts(apart, "mib"), edge_counts(apart, "graph"))
    with pytest.raises(ValueError, match="convention 'mine': expected 'graph' or 'mib'"):
        edge_counts(apart, "mine")


@given(seed=st.integers(0, 999), convention=st.sampled_from(["graph", "mib"]))
def test_circuits_are_the_longest_runs_of_top_edges_that_fit(seed, convention):
    scores = random_scores(GROUPED, seed).tensor
    counts = edge_counts(GROUPED, convention)
    order = sorted(range(len(scores)), key=lambda edge: -float(scores[edge]))
    for share, mask in zip(MIB_SHARES, top_masks(scores, counts, MIB_SHARES), strict=True):
        budget, kept, total = int(share * int(counts.sum())), set(), 0
        for edge in order:
            total += int(counts[edge])
            if total > budget:
                break
            kept.add(edge)
        assert set(mask.nonzero().flatten().tolist()) == kept
        if convention == "graph":
            assert len(kept) == int(share * GROUPED.n_edges)


# --------------------------------------------------------------------------------- on a model


@pytest.mark.parametrize("absolute", [True, False, None])
def test_a_curve_is_its_circuits_one_by_one(absolute):
    """None: what fits the scores, here learned ones, which are ranked as they are."""
    model = model_zoo.load("bridge-llama-gqa")
    graph, task = EdgeGraph.from_model(model), model_zoo.pairs(model, 3)
    scores, shares = random_scores(graph), (0.005, 0.2, 0.7, 1.0)
    scores = replace(scores, by_magnitude=absolute is not None)
    curve = faithfulness_curve(model, scores, task, shares=shares, absolute=absolute)
    ranked = scores.tensor.abs() if absolute else scores.tensor
    for place, share in enumerate(shares):
        size = int(share * graph.n_edges)
        nothing = Circuit(graph, torch.zeros(graph.n_edges, dtype=torch.bool))
        circuit = Circuit.top(graph, ranked, size) if size else nothing
        alone = evaluate(model, circuit.without_dead_edges(), task)
        assert curve.n_edges[place] == alone.n_edges
        assert curve.faithfulness[place] == pytest.approx(alone.faithfulness, abs=1e-4)
    assert curve.faithfulness[-1] == pytest.approx(1, abs=1e-4)
    assert (curve.full, curve.empty) == pytest.approx(
        (alone.logit_diff_full, alone.logit_diff_empty), abs=1e-5
    )


def test_mib_takes_one_figure_from_each_ranking():
    model = model_zoo.load("bridge-llama-gqa")
    task, scores = model_zoo.pairs(model, 2), random_scores(EdgeGraph.from_model(model))
    shares = (0.1, 0.5, 1.0)
    found = mib_faithfulness(model, scores, task, shares=shares, measure="kl")
    settings = {"shares": shares, "measure": "kl", "convention": "mib"}
    signed = faithfulness_curve(model, scores, task, absolute=False, **settings)
    absolute = faithfulness_curve(model, scores, task, absolute=True, **settings)
    assert (found.signed, found.absolute) == (signed, absolute)
    assert (found.cpr, found.cmd) == (signed.cpr, absolute.cmd)
    assert signed.n_edges[-1] == int(edge_counts(scores.graph, "mib").sum())


def test_scores_that_are_ranked_as_they_are_have_one_curve():
    model = model_zoo.load("bridge-llama-gqa")
    task, scores = model_zoo.pairs(model, 2), random_scores(EdgeGraph.from_model(model))
    scores = replace(scores, by_magnitude=False)
    found = mib_faithfulness(model, scores, task, shares=(0.1, 1.0), measure="kl")
    alone = faithfulness_curve(
        model, scores, task, shares=(0.1, 1.0), measure="kl", convention="mib"
    )
    assert found.signed == found.absolute == alone


@pytest.mark.parametrize("shares", [(), (0.0, 1.0), (0.5, 0.2), (0.5, 0.5), (0.5, 1.1)])
def test_shares_that_do_not_rise_to_one_are_refused(shares):
    model = model_zoo.load("bridge-llama-gqa")
    scores = random_scores(EdgeGraph.from_model(model))
    with pytest.raises(ValueError, match="expected rising numbers above 0 and at most 1"):
        faithfulness_curve(model, scores, model_zoo.pairs(model, 2), shares=shares)


def test_rankings_of_another_model_and_measures_without_a_scale_are_refused():
    model = model_zoo.load("bridge-llama-gqa")
    with pytest.raises(ValueError, match="the ranking is for another model"):
        faithfulness_curve(model, random_scores(GROUPED), model_zoo.pairs(model, 2))

    def constant(logits, full, batch):
        return logits[:, 0, 0] * 0

    scores = random_scores(EdgeGraph.from_model(model))
    with pytest.raises(ValueError, match="with all edges and with none"):
        faithfulness_curve(
            model, scores, model_zoo.pairs(model, 2), shares=(1.0,), measure=constant
        )


def test_a_measure_that_is_no_number_is_refused():
    model = model_zoo.load("bridge-llama-gqa")
    scores = random_scores(EdgeGraph.from_model(model))

    def nothing(logits, full, batch):
        return (logits - full).mean((-1, -2)) / 0

    with pytest.raises(ValueError, match="measures NaN or infinite"):
        faithfulness_curve(
            model, scores, model_zoo.pairs(model, 2), shares=(0.5, 1.0), measure=nothing
        )
