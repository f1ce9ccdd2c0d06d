"""ROC curves against the count of pairs in the right order; precision and recall as sets."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.evaluation.roc import node_scores, precision_recall, roc, roc_of
from tl_edgeprune.graph.edge_graph import EdgeGraph

GRAPH = EdgeGraph(n_layers=1, n_heads=2, n_kv_heads=1)
ranked = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=25).filter(
    lambda items: len({wanted for _, wanted in items}) == 2
)


def auc_by_counting(scores: list[float], wanted: list[bool]) -> float:
    """The chance that a wanted item outranks another, ties counting half."""
    inside = [s for s, w in zip(scores, wanted, strict=True) if w]
    outside = [s for s, w in zip(scores, wanted, strict=True) if not w]
    wins = sum((a > b) + (a == b) / 2 for a, b in itertools.product(inside, outside))
    return wins / (len(inside) * len(outside))


@given(ranked)
def test_the_area_is_the_share_of_pairs_in_order(items):
    scores, wanted = map(list, zip(*items, strict=True))
    found = roc_of(torch.tensor(scores).double(), torch.tensor(wanted))
    assert found.auc == pytest.approx(auc_by_counting(scores, wanted))
    steps = sorted(set(scores), reverse=True)
    for place, threshold in enumerate(steps, start=1):
        above = [w for s, w in items if s >= threshold]
        assert found.true_positive[place] == pytest.approx(sum(above) / sum(wanted))
        others = len(wanted) - sum(wanted)
        assert found.false_positive[place] == pytest.approx((len(above) - sum(above)) / others)
    assert (found.false_positive[0], found.true_positive[0]) == (0, 0)


@given(
    st.lists(st.integers(-3, 3), min_size=GRAPH.n_edges, max_size=GRAPH.n_edges),
    st.sets(st.integers(0, GRAPH.n_edges - 1), min_size=1, max_size=GRAPH.n_edges - 1),
    st.booleans(),
)
def test_edges_and_nodes_of_a_graph(values, known, absolute):
    mask = torch.tensor([edge in known for edge in range(GRAPH.n_edges)])
    circuit, scores = Circuit(GRAPH, mask), EdgeScores(GRAPH, torch.tensor(values).float())
    used = [abs(v) for v in values] if absolute else values
    found = roc(scores, circuit, absolute=absolute)
    assert found.auc == pytest.approx(auc_by_counting(used, mask.tolist()))
    nodes = [name in circuit.nodes for name in GRAPH.sources]
    highest = []
    for name in GRAPH.sources:
        touching = []
        for value, edge in zip(used, GRAPH.edges, strict=True):
            source, destination = edge.split("->")
            if name == source or name in GRAPH.owner(destination):
                touching.append(value)
        highest.append(max(touching))
    assert node_scores(torch.tensor(used).double(), GRAPH).tolist() == highest
    if all(nodes):
        with pytest.raises(ValueError, match=r"has 4 of the graph's 4 nodes"):
            roc(scores, circuit, level="node", absolute=absolute)
    else:
        by_node = roc(scores, circuit, level="node", absolute=absolute)
        assert by_node.auc == pytest.approx(auc_by_counting(highest, nodes))


def test_a_ranking_that_puts_the_known_edges_first_is_perfect():
    known = Circuit.from_edges(GRAPH, ["input->a0.h0<q>", "a0.h0->logits"])
    scores = EdgeScores(GRAPH, known.mask.float())
    assert roc(scores, known).auc == roc(scores, known, level="node").auc == 1
    assert roc(EdgeScores(GRAPH, -known.mask.float()), known, absolute=False).auc == 0
    assert roc(EdgeScores(GRAPH, -known.mask.float(), by_magnitude=False), known).auc == 0
    assert str(roc(EdgeScores(GRAPH, torch.zeros(GRAPH.n_edges)), known)) == "AUC 0.500"


def test_precision_and_recall_are_shares_of_sets():
    known = Circuit.from_edges(GRAPH, ["input->a0.h0<q>", "a0.h0->logits"])
    found = Circuit.from_edges(GRAPH, ["a0.h0->logits", "m0->logits", "input->logits"])
    assert precision_recall(found, known) == (1 / 3, 1 / 2)
    assert precision_recall(found, known, level="node") == (2 / 3, 1)
    assert precision_recall(known - known, known) == (1, 0)
    assert precision_recall(found, known - known) == (0, 1)


def test_what_cannot_be_compared_is_refused():
    known = Circuit.from_edges(GRAPH, ["m0->logits"])
    other = EdgeGraph(n_layers=1, n_heads=1, n_kv_heads=1)
    scores = EdgeScores(GRAPH, torch.zeros(GRAPH.n_edges))
    with pytest.raises(ValueError, match="the known circuit is of another graph"):
        roc(EdgeScores(other, torch.zeros(other.n_edges)), known)
    with pytest.raises(ValueError, match="unknown level 'head'"):
        precision_recall(known, known, level="head")
    with pytest.raises(ValueError, match="has 0 of the graph's"):
        roc(scores, known - known)
