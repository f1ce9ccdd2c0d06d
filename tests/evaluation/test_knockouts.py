"""Completeness and minimality against masks cut by hand, and on a program that is known."""

from __future__ import annotations

import pytest
import torch

from tl_edgeprune import models, tasks
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.evaluation.evaluate import evaluate
from tl_edgeprune.evaluation.knockouts import (
    Completeness,
    Knockout,
    Minimality,
    completeness,
    inner_nodes,
    knock_out,
    minimality,
)
from tl_edgeprune.graph.edge_graph import EdgeGraph


@pytest.fixture(scope="module")
def setting():
    model = models.load("tracr-reverse")
    graph = EdgeGraph.from_model(model)
    task = tasks.load("tracr-reverse", model, 60, seed=1)
    task = task.subset([i for i, tokens in enumerate(task.clean) if len(tokens) == 5])
    edges = models.known_circuit("tracr-reverse", "zero")
    return model, task, Circuit.from_edges(graph, edges, ablation="zero")


def without(circuit: Circuit, *nodes: str) -> Circuit:
    edges = [edge for edge in circuit.edges if edge.split("->")[0] not in nodes]
    return Circuit.from_edges(circuit.graph, edges, **circuit.metadata)


def full(circuit: Circuit) -> Circuit:
    return Circuit(circuit.graph, circuit.mask | True, circuit.metadata)


def measure(model, circuit, task) -> float:
    return -evaluate(model, circuit, task).mse


def test_a_knockout_cuts_what_leaves_the_nodes(setting):
    _, _, circuit = setting
    assert inner_nodes(circuit) == ("a0.h0", "m0", "m1", "m2", "a3.h0")
    for nodes in ((), ("m0",), ("m1", "a3.h0")):
        cut = knock_out(circuit.mask, circuit.graph, nodes)
        assert torch.equal(cut, without(circuit, *nodes).mask)
    with pytest.raises(KeyError, match="unknown node 'm9': this graph has input"):
        knock_out(circuit.mask, circuit.graph, ["m9"])


def test_completeness_is_the_difference_of_what_remains(setting):
    model, task, circuit = setting
    found = completeness(model, circuit, task, n_random=3, n_greedy=1, greedy_size=2, seed=3)
    assert (found.circuit, found.model) == pytest.approx((0, 0), abs=1e-10)
    assert len(found.knockouts) == 4 and len(found.knockouts[-1].nodes) == 2
    for knockout in found.knockouts:
        assert set(knockout.nodes) <= set(inner_nodes(circuit))
        own = measure(model, without(circuit, *knockout.nodes), task)
        whole = measure(model, without(full(circuit), *knockout.nodes), task)
        assert (knockout.circuit, knockout.model) == pytest.approx((own, whole), abs=1e-6)
        assert knockout.incompleteness == pytest.approx(abs(own - whole), abs=1e-6)
    assert found.worst.incompleteness == max(k.incompleteness for k in found.knockouts)
    again = completeness(model, circuit, task, n_random=3, n_greedy=1, greedy_size=2, seed=3)
    assert again == found


def test_the_full_model_is_complete(setting):
    model, task, circuit = setting
    assert completeness(model, full(circuit), task, n_random=3).worst.incompleteness < 1e-10


def test_greedy_growth_takes_the_worst_node_each_time(setting):
    model, task, circuit = setting
    nodes = inner_nodes(circuit)
    (grown,) = completeness(
        model, circuit, task, n_random=0, n_greedy=1, greedy_size=1, candidates=len(nodes)
    ).knockouts
    alone = {
        node: abs(
            measure(model, without(circuit, node), task)
            - measure(model, without(full(circuit), node), task)
        )
        for node in nodes
    }
    assert grown.incompleteness == pytest.approx(max(alone.values()), abs=1e-6)


@pytest.mark.parametrize("edges", [False, True])
def test_each_part_of_the_known_circuit_matters_as_much_as_its_loss(setting, edges):
    model, task, circuit = setting
    spare = circuit | Circuit.from_edges(circuit.graph, ["m3->logits"], ablation="zero")
    found = minimality(model, spare, task, edges=edges)
    names = spare.edges if edges else inner_nodes(spare)
    assert tuple(found.scores) == names
    for name in names[::3]:
        rest = (
            spare - Circuit.from_edges(spare.graph, [name], ablation="zero")
            if edges
            else without(spare, name)
        )
        assert found.scores[name] == pytest.approx(
            abs(measure(model, rest, task) - measure(model, spare, task)), abs=1e-6
        )
    assert found.least == ("m3->logits" if edges else "m3")
    assert found.scores[found.least] < 1e-8


def test_minimality_after_others_are_gone(setting):
    model, task, circuit = setting
    found = minimality(model, circuit, task, without={"m0": ["a3.h0"]})
    assert found.scores["m0"] < 1e-8 < found.scores["m1"]  # nothing reads m0 then
    with pytest.raises(KeyError, match="not in the circuit"):
        minimality(model, circuit, task, without={"m3": ["m0"]})


def test_shares_of_the_models_own_measure():
    found = Minimality({"m0": 1.0, "m1": 0.5}, circuit=-1.5, model=-2.0)
    assert found.relative == {"m0": 0.5, "m1": 0.25} and found.least == "m1"
    with pytest.raises(ValueError, match="measure of the full model is 0"):
        _ = Minimality({"m0": 1.0}, circuit=-1.0, model=0.0).relative


def test_a_circuit_of_inputs_alone_has_nothing_to_knock_out(setting):
    model, task, circuit = setting
    direct = Circuit.from_edges(circuit.graph, ["input->logits"])
    with pytest.raises(ValueError, match="no heads or MLPs"):
        completeness(model, direct, task)


def test_without_nodes_none_is_the_least():
    with pytest.raises(ValueError, match="no heads and MLPs, so none of them is the least"):
        _ = Minimality({}, 1.0, 1.0).least


def test_results_are_shown_in_a_line():
    many = Minimality({f"m{n}": 0.5 + n for n in range(99)}, circuit=1.25, model=-1e-9)
    assert repr(many) == (
        "Minimality(99 scores from 0.5 (m0) to 98.5 (m98), F(circuit) 1.25, F(model) -1e-09)"
    )
    assert "no scores" in repr(Minimality({}, 1.0, 1.0))
    knockouts = (Knockout(("a0.h1", "m1"), 0.5, 3.0), Knockout(("m0",), 1.0, 1.0))
    found = Completeness(1.0, 2.0, knockouts)
    assert repr(found) == str(found)
    assert repr(found) == (
        "Completeness(2 knockouts of F(circuit) 1 and F(model) 2, worst incompleteness 2.5 "
        "without a0.h1, m1)"
    )
    assert "worst incompleteness 1 without no node" in repr(Completeness(1.0, 2.0, ()))
