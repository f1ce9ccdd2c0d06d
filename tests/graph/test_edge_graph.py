"""The edge graph, held to its definition written as loops, and to the counts in the literature."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_edgeprune.graph.edge_graph import EdgeGraph

GPT2_SMALL = EdgeGraph(n_layers=12, n_heads=12, n_kv_heads=12)
SMOLLM2 = EdgeGraph(n_layers=30, n_heads=9, n_kv_heads=3)


@st.composite
def graphs(draw: st.DrawFn) -> EdgeGraph:
    group = draw(st.integers(1, 3))
    n_kv_heads = draw(st.integers(1, 3))
    return EdgeGraph(
        n_layers=draw(st.integers(1, 4)),
        n_heads=group * n_kv_heads,
        n_kv_heads=n_kv_heads,
        has_mlp=draw(st.booleans()),
        parallel=draw(st.booleans()),
        split_qkv=group > 1 or draw(st.booleans()),
        split_embeddings=draw(st.booleans()),
    )


def edges_by_definition(graph: EdgeGraph) -> list[str]:
    """A destination reads all that was written before it, in the order in which a model runs."""
    edges: list[str] = []
    written = ["tok", "pos"] if graph.split_embeddings else ["input"]
    group = graph.n_heads // graph.n_kv_heads
    for layer in range(graph.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(graph.n_heads)]
        owners = [f"a{layer}.kv{g}" for g in range(graph.n_kv_heads)] if group > 1 else heads
        destinations = heads
        if graph.split_qkv:
            destinations = [f"{head}<q>" for head in heads]
            destinations += [f"{owner}<{part}>" for part in "kv" for owner in owners]
        edges += [f"{source}->{destination}" for destination in destinations for source in written]
        if graph.has_mlp:
            before = written if graph.parallel else written + heads
            edges += [f"{source}->m{layer}" for source in before]
        written = written + heads + ([f"m{layer}"] if graph.has_mlp else [])
    return edges + [f"{source}->logits" for source in written]


@pytest.mark.parametrize(
    "graph, n_edges",
    [
        pytest.param(GPT2_SMALL, 32_491, id="gpt2-small"),
        pytest.param(EdgeGraph(12, 12, 12, split_embeddings=True), 32_936, id="gpt2-small-tok-pos"),
        pytest.param(SMOLLM2, 70_651, id="smollm2-135m"),
        pytest.param(EdgeGraph(2, 1, 1), 23, id="tracr-xproportion"),
        pytest.param(EdgeGraph(4, 1, 1), 77, id="tracr-reverse"),
    ],
)
def test_counts_of_known_models(graph: EdgeGraph, n_edges: int) -> None:
    assert graph.n_edges == len(graph.edges) == n_edges


@given(graphs())
def test_edges_are_those_of_the_definition(graph: EdgeGraph) -> None:
    assert list(graph.edges) == edges_by_definition(graph)
    assert graph.n_edges == len(set(graph.edges))


@given(graphs(), st.data())
def test_an_edge_has_one_place_and_one_name(graph: EdgeGraph, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, graph.n_edges - 1))
    assert graph.index(graph.edges[place]) == place
    source, destination = graph.pairs[place]
    assert graph.edges[place] == f"{graph.sources[source]}->{graph.destinations[destination]}"


@given(graphs())
def test_every_destination_reads_a_prefix_of_the_sources(graph: EdgeGraph) -> None:
    for destination in range(len(graph.destinations)):
        read = [source for source, place in graph.pairs if place == destination]
        assert read == list(range(len(read)))


@given(graphs())
def test_reads_tile_the_flat_vector_and_the_destinations(graph: EdgeGraph) -> None:
    reads = graph.reads
    assert reads[0].edges.start == reads[0].first_destination == 0
    assert reads[-1].edges.stop == graph.n_edges
    for before, after in pairwise(reads):
        assert after.edges.start == before.edges.stop
        assert after.first_destination == before.first_destination + before.n_destinations
    assert reads[-1].first_destination + 1 == len(graph.destinations)


@given(graphs())
def test_information_flows_forward(graph: EdgeGraph) -> None:
    """What a destination feeds writes after everything that the destination reads."""
    place = {name: index for index, name in enumerate(graph.sources)}
    for source, destination in graph.pairs:
        owners = graph.owner(graph.destinations[destination])
        assert all(place[owner] > source for owner in owners)


@given(graphs())
def test_every_head_and_mlp_is_fed_by_some_destination(graph: EdgeGraph) -> None:
    fed = {owner for destination in graph.destinations for owner in graph.owner(destination)}
    assert fed == set(graph.sources[graph.n_inputs :])


def test_owners() -> None:
    assert SMOLLM2.owner("a3.h4<q>") == ("a3.h4",)
    assert SMOLLM2.owner("a3.kv1<k>") == ("a3.h3", "a3.h4", "a3.h5")
    assert SMOLLM2.owner("m3") == ("m3",)
    assert SMOLLM2.owner("logits") == ()
    assert EdgeGraph(2, 2, 2, split_qkv=False).owner("a1.h0") == ("a1.h0",)


@given(graphs())
def test_places_of_heads_and_mlps(graph: EdgeGraph) -> None:
    for layer in range(graph.n_layers):
        assert graph.sources[graph.first_head(layer)] == f"a{layer}.h0"
        if graph.has_mlp:
            assert graph.sources[graph.mlp_source(layer)] == f"m{layer}"


@given(graphs())
def test_a_graph_survives_json(graph: EdgeGraph) -> None:
    again = EdgeGraph.from_dict(json.loads(json.dumps(graph.to_dict())))
    assert again == graph and hash(again) == hash(graph)
    assert again.edges == graph.edges


def test_parallel_blocks_mlps_do_not_read_their_own_heads() -> None:
    graph = EdgeGraph(2, 2, 2, parallel=True)
    assert "a0.h0->m1" in graph.edges
    assert "a1.h0->m1" not in graph.edges


@pytest.mark.parametrize(
    "edge, reason",
    [
        ("a0.h3->a5.h2", "no a5.h2. Nearest: a0.h3->a5.h2<"),
        ("a0.h3->a5.h2<x>", "no a5.h2<x>. Nearest: a0.h3->a5.h2<"),
        ("a0.h33->a5.h2<q>", "no a0.h33. Nearest: a0.h3->a5.h2<q>"),
        ("inputs->m0", "no inputs. Nearest: input->m0"),
        ("input->logit", "no logit. Nearest: input->logits"),
        ("m5->a3.h0<q>", "a3.h0<q> comes before m5 writes"),
        ("m3", "is no edge: an edge is written 'source->destination', as 'input->a0.h0<q>'"),
        ("", "is no edge"),
    ],
)
def test_an_unknown_edge_is_answered_with_the_nearest(edge: str, reason: str) -> None:
    with pytest.raises(KeyError) as error:
        GPT2_SMALL.index(edge)
    assert repr(edge) in str(error.value.args[0])
    assert reason in error.value.args[0]


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"n_layers": 0, "n_heads": 1, "n_kv_heads": 1}, "layers and heads must be 1 or more"),
        ({"n_layers": 1, "n_heads": 9, "n_kv_heads": 2}, "9 heads cannot share 2"),
        (
            {"n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "split_qkv": False},
            "needs a key and a value per head",
        ),
        ({"n_layers": 1, "n_heads": 4}, "not the description of an edge graph: .*n_kv_heads"),
        ({"n_layers": 1, "n_heads": 4, "n_kv_heads": 4, "depth": 2}, "not the description.*depth"),
    ],
)
def test_impossible_graphs_are_refused(fields: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        EdgeGraph.from_dict(fields)
