"""Circuits: files, set algebra, exact sizes, and dead edges against a walk along every path."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tl_edgeprune
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.graph.edge_graph import EdgeGraph

GRAPHS = {
    "plain": EdgeGraph(2, 2, 2),
    "grouped": EdgeGraph(2, 4, 2),
    "multi-query": EdgeGraph(2, 3, 1),
    "parallel": EdgeGraph(2, 2, 2, parallel=True),
    "attention-only": EdgeGraph(3, 2, 2, has_mlp=False),
    "one-input-a-head": EdgeGraph(2, 2, 2, split_qkv=False),
    "two-embeddings": EdgeGraph(2, 1, 1, split_embeddings=True),
    "deep": EdgeGraph(4, 1, 1),
}
GRAPH = GRAPHS["grouped"]


def random_circuit(graph: EdgeGraph, share: float, seed: int) -> Circuit:
    generator = torch.Generator().manual_seed(seed)
    return Circuit(graph, torch.rand(graph.n_edges, generator=generator) < share)


graphs = st.sampled_from(sorted(GRAPHS)).map(GRAPHS.__getitem__)
seeds = st.integers(0, 9999)
shares = st.sampled_from([0.0, 0.05, 0.15, 0.4, 0.8, 1.0])


# ---------------------------------------------------------------------------------------- on disk


@given(graph=graphs, share=shares, seed=seeds)
def test_a_file_gives_the_circuit_back(graph, share, seed):
    settings = {"lr": 0.1, "graph": None, "path": "é"}
    metadata = {"task": "ioi", "seed": seed, "graph": "of another name", "settings": settings}
    circuit = Circuit(graph, random_circuit(graph, share, seed).mask, metadata)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "circuit.json"
        circuit.save(path)
        loaded = Circuit.load(path)
        assert [file.name for file in path.parent.iterdir()] == ["circuit.json"]
    assert loaded == circuit and hash(loaded) == hash(circuit)
    assert loaded.graph == circuit.graph and loaded.metadata == metadata


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "circuit.json"
    random_circuit(GRAPH, 0.2, 0).save(path)
    return path


def test_a_file_names_its_edges_and_the_libraries(saved):
    document = json.loads(saved.read_text())
    assert document["edges"] == list(random_circuit(GRAPH, 0.2, 0).edges)
    assert {"tl_edgeprune", "transformer-lens", "transformers", "torch"} <= set(
        document["versions"]
    )
    assert document["versions"]["tl_edgeprune"] == tl_edgeprune.__version__


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="is no circuit file, or a damaged one"):
        Circuit.load(saved)


def _damage(document, key, value):
    return (
        {k: v for k, v in document.items() if k != key}
        if value is None
        else document | {key: value}
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", None, "Expected one written by Circuit.save"),
        ("kind", "another program's", "Expected one written by Circuit.save"),
        ("format", 0, "has format 0, this version reads 1"),
        ("format", None, "has format None, this version reads 1"),
        ("graph", None, "is damaged: 'graph'"),
        ("graph", {"n_layers": 2}, "not the description of an edge graph"),
        ("graph", {"n_layers": 0, "n_heads": 1, "n_kv_heads": 1}, "layers and heads must be 1 or"),
        ("graph", [2, 4], "damaged"),
        ("edges", None, "is damaged: 'edges'"),
        ("edges", ["input->m9"], r"is damaged.*unknown edge 'input->m9'"),
        ("edges", [], "it says 15 edges and lists 0"),
        ("edges", 7, "damaged"),
        ("edges", [7], "damaged"),
        ("metadata", None, "is damaged: 'metadata'"),
        ("metadata", [1], "damaged"),
        ("n_edges", 3, "it says 3 edges and lists 15"),
        ("n_edges", None, "it says None edges"),
    ],
)
def test_a_damaged_or_older_file_is_refused_by_name(saved, key, value, message):
    document = json.loads(saved.read_text())
    document["edges"], document["n_edges"] = document["edges"][:15], 15
    saved.write_text(json.dumps(_damage(document, key, value)))
    with pytest.raises(ValueError, match=message) as error:
        Circuit.load(saved)
    assert "circuit.json" in str(error.value)


@pytest.mark.parametrize("content", [b"[]", b"3", b'"text"', b'{"cfg": {}, "nodes": {}}'])
def test_another_programs_file_is_refused(saved, content):
    saved.write_bytes(content)
    with pytest.raises(
        ValueError, match="is no circuit file. Expected one written by Circuit.save"
    ):
        Circuit.load(saved)


def test_a_file_that_is_no_text_is_refused_and_a_missing_one_is_missing(saved):
    saved.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="is no circuit file"):
        Circuit.load(saved)
    with pytest.raises(FileNotFoundError):
        Circuit.load(saved.parent / "none.json")


def test_metadata_that_json_cannot_write_leaves_the_old_file(saved):
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        Circuit(GRAPH, torch.zeros(GRAPH.n_edges, dtype=torch.bool), {"x": object()}).save(saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["circuit.json"]


# ------------------------------------------------------------------------------------- set algebra


@given(drawn=st.tuples(shares, shares, shares), seed=seeds)
def test_circuits_are_sets_of_edges(drawn, seed):
    a, b, c = (random_circuit(GRAPH, share, seed + i) for i, share in enumerate(drawn))
    A, B, _C = set(a.edges), set(b.edges), set(c.edges)
    assert set((a & b).edges) == A & B
    assert set((a | b).edges) == A | B
    assert set((a - b).edges) == A - B
    assert a & (b | c) == (a & b) | (a & c)
    assert a - (b & c) == (a - b) | (a - c)
    assert (a & b).n_edges + (a | b).n_edges == a.n_edges + b.n_edges
    assert a.iou(b) == b.iou(a) == (len(A & B) / len(A | B) if A | B else 1.0)
    assert a.iou(a) == 1.0
    assert len(a) == a.n_edges == len(A)
    assert a.sparsity == pytest.approx(1 - len(A) / GRAPH.n_edges)
    assert [edge for edge in GRAPH.edges if edge in a] == list(a.edges)


def test_two_empty_circuits_are_the_same_one():
    empty = random_circuit(GRAPH, 0.0, 0)
    assert empty.iou(empty) == 1.0 and empty.edges == () and empty.nodes == ()
    assert empty.iou(random_circuit(GRAPH, 1.0, 0)) == 0.0


def test_only_metadata_that_both_share_remains():
    mask = torch.ones(GRAPH.n_edges, dtype=torch.bool)
    a = Circuit(GRAPH, mask, {"task": "ioi", "seed": 0})
    b = Circuit(GRAPH, mask, {"task": "ioi", "seed": 1})
    for both in (a & b, a | b, a - b):
        assert both.metadata == {"task": "ioi"}


ZERO = {"ablation": "zero", "folded": False}


@pytest.mark.parametrize(
    ("ours", "theirs", "combined"),
    [
        (ZERO, ZERO, ZERO),
        (ZERO, {}, ZERO),  # edges by name tell nothing
        ({}, ZERO, ZERO),
        ({}, {}, {}),
        (ZERO, {"ablation": "mean"}, {"ablation": ["mean", "zero"], "folded": False}),
        ({"ablation": ["mean", "zero"]}, {"ablation": "zero"}, {"ablation": ["mean", "zero"]}),
        (ZERO, {"folded": True}, {"ablation": "zero", "folded": [False, True]}),
    ],
)
def test_a_combination_tells_its_parts_ablations(ours, theirs, combined):
    a, b = (Circuit(GRAPH, random_circuit(GRAPH, 0.5, 0).mask, m) for m in (ours, theirs))
    for both in (a & b, a | b, a - b):
        assert both.metadata == combined
    assert a.iou(b) == 1


def test_circuits_of_two_graphs_do_not_combine():
    a, b = random_circuit(GRAPH, 0.5, 0), random_circuit(GRAPHS["plain"], 0.5, 0)
    for combine in (a.__and__, a.__or__, a.__sub__, a.iou):
        with pytest.raises(ValueError, match="circuits of different graphs"):
            combine(b)
    assert a != b and a != "a circuit"


def test_a_circuit_does_not_follow_the_mask_that_it_was_made_of():
    mask = torch.zeros(GRAPH.n_edges, dtype=torch.bool)
    circuit = Circuit(GRAPH, mask)
    mask[0] = True
    assert circuit.n_edges == 0


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=rf"a circuit's mask is bool \[{GRAPH.n_edges}\], got"):
        Circuit(GRAPH, torch.ones(3, dtype=torch.bool))


# --------------------------------------------------------------------------------- names and sizes


def test_from_edges_takes_names_in_any_order():
    edges = ["m1->logits", "input->m0", "a0.h1->a1.kv0<k>"]
    assert set(Circuit.from_edges(GRAPH, edges).edges) == set(edges)
    assert Circuit.from_edges(GRAPH, [], task="x").metadata == {"task": "x"}


@pytest.mark.parametrize(
    ("edge", "said"),
    [
        ("input->mO", ["no mO", "input->m0"]),
        ("a0.h1->a1.h0<k>", ["no a1.h0<k>", "Nearest: a0.h1->a1.h0<q>"]),
        ("m1->m0", ["m0 comes before m1 writes"]),
        ("input", ["an edge is written 'source->destination'"]),
        ("embed->lm_head", ["no embed and no lm_head", "Nearest: none"]),
    ],
)
def test_an_unknown_edge_is_refused_with_the_nearest(edge, said):
    with pytest.raises(KeyError) as error:
        Circuit.from_edges(GRAPH, [edge])
    assert all(part in str(error.value) for part in said), error.value
    with pytest.raises(KeyError):
        edge in random_circuit(GRAPH, 0.5, 0)  # noqa: B015


@given(graph=graphs, seed=st.integers(0, 999), data=st.data())
def test_top_keeps_exactly_k_and_of_equal_scores_the_first(graph, seed, data):
    k = data.draw(st.integers(1, graph.n_edges))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(4, (graph.n_edges,), generator=generator).float()  # many are equal
    expected = sorted(range(graph.n_edges), key=lambda i: (-float(scores[i]), i))[:k]
    assert set(Circuit.top(graph, scores, k).mask.nonzero().flatten().tolist()) == set(expected)


def test_scores_rank_by_magnitude_or_by_sign():
    scores = torch.zeros(GRAPH.n_edges)
    scores[3], scores[5] = -2.0, 1.0
    found = EdgeScores(GRAPH, scores, {"method": "made"})
    assert found.top(1).edges == (GRAPH.edges[3],) and found.top(1).metadata == {"method": "made"}
    assert found.top(1, absolute=False).edges == (GRAPH.edges[5],)
    assert found.threshold(1.5).edges == (GRAPH.edges[3],)
    assert found.threshold(1.0, absolute=False).edges == (GRAPH.edges[5],)
    assert found[GRAPH.edges[3]] == -2.0


@pytest.mark.parametrize("k", [0, -1, GRAPH.n_edges + 1])
def test_a_size_outside_the_graph_is_refused(k):
    expected = f"n_edges={k}: expected a whole number from 1 to {GRAPH.n_edges}"
    with pytest.raises(ValueError, match=expected):
        Circuit.top(GRAPH, torch.zeros(GRAPH.n_edges), k)
    with pytest.raises(ValueError, match=expected):
        EdgeScores(GRAPH, torch.zeros(GRAPH.n_edges)).top(k)


def test_scores_of_another_length_or_with_nan_are_refused():
    with pytest.raises(ValueError, match=rf"scores of shape \(3,\) for {GRAPH.n_edges} edges"):
        EdgeScores(GRAPH, torch.zeros(3))
    with pytest.raises(ValueError, match="NaN or infinite"):
        EdgeScores(GRAPH, torch.full((GRAPH.n_edges,), float("nan")))


# --------------------------------------------------------------------------------------- dead edges


def heads_behind(destination: str, graph: EdgeGraph) -> list[str]:
    """The sources that a destination feeds, from its name alone."""
    node = destination.split("<")[0]
    if ".kv" not in node:
        return [] if node == "logits" else [node]
    layer, group = node.split(".kv")
    size = graph.n_heads // graph.n_kv_heads
    return [f"{layer}.h{int(group) * size + i}" for i in range(size)]


def edges_on_paths(circuit: Circuit) -> set[str]:
    """Every kept edge that some walk from an input to the logits takes, by walking them all."""
    out = defaultdict(list)
    for edge in circuit.edges:
        out[edge.split("->")[0]].append(edge)
    on_paths: set[str] = set()

    def walk(source: str, so_far: tuple[str, ...]) -> None:
        for edge in out[source]:
            destination = edge.split("->")[1]
            if destination == "logits":
                on_paths.update((*so_far, edge))
            for owner in heads_behind(destination, circuit.graph):
                walk(owner, (*so_far, edge))

    for source in circuit.graph.sources[: circuit.graph.n_inputs]:
        walk(source, ())
    return on_paths


@given(graph=graphs, share=st.floats(0.02, 0.3), seed=seeds)  # the number of walks grows fast
def test_alive_edges_are_those_on_a_path_from_the_input_to_the_logits(graph, share, seed):
    circuit = random_circuit(graph, share, seed)
    alive = circuit.without_dead_edges()
    assert set(alive.edges) == edges_on_paths(circuit)
    assert alive.without_dead_edges() == alive


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("seed", range(8))
def test_alive_edges_in_every_kind_of_graph(name, seed):
    circuit = random_circuit(GRAPHS[name], 0.12 + 0.02 * seed, seed)
    assert set(circuit.without_dead_edges().edges) == edges_on_paths(circuit)


@pytest.mark.parametrize("name", GRAPHS)
def test_in_the_whole_graph_no_edge_is_dead(name):
    whole = random_circuit(GRAPHS[name], 1.0, 0)
    assert whole.without_dead_edges() == whole
    assert set(whole.nodes) == set(GRAPHS[name].sources)


def test_a_shared_key_leads_to_every_head_of_its_group():
    edges = ["input->a0.kv0<k>", "a0.h1->logits", "a0.h2->logits"]
    circuit = Circuit.from_edges(GRAPH, edges, task="t")
    assert circuit.without_dead_edges().edges == ("input->a0.kv0<k>", "a0.h1->logits")
    assert circuit.without_dead_edges().metadata == {"task": "t"}
    assert circuit.nodes == ("input", "a0.h0", "a0.h1", "a0.h2")


def test_a_circuit_says_its_size():
    circuit = Circuit.from_edges(GRAPH, ["input->logits"], task="ioi")
    assert repr(circuit) == f"Circuit(1 of {GRAPH.n_edges} edges, 98.78 % pruned, ioi)"
