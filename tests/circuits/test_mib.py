"""EAP-IG's and MIB's files, against their layout by name; networkx, against dead edges."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support import model_zoo
from test_circuit import GRAPHS, random_circuit, seeds, shares
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_edgeprune import Circuit, EdgeScores, discover, mib_faithfulness
from tl_edgeprune.graph.edge_counts import edge_counts
from tl_edgeprune.graph.edge_graph import EdgeGraph

HELD = {
    name: graph for name, graph in GRAPHS.items() if graph.has_mlp and not graph.split_embeddings
} | {"parallel-grouped": EdgeGraph(2, 4, 2, parallel=True)}
GROUPED, PLAIN = HELD["grouped"], HELD["plain"]
graphs = st.sampled_from(sorted(HELD)).map(HELD.__getitem__)
endings = st.sampled_from([".json", ".pt"])


# A circuit of shared edges has more of them over there, and says so whenever it is written.
pytestmark = pytest.mark.filterwarnings("ignore:.*in EAP-IG's and MIB's count:UserWarning")


def random_scores(graph: EdgeGraph, seed: int) -> EdgeScores:
    generator = torch.Generator().manual_seed(seed)
    return EdgeScores(graph, torch.randn(graph.n_edges, generator=generator))


def mib_edges(graph: EdgeGraph) -> dict[str, str]:
    """EAP-IG's edges, and ours that each stands for, from the rules of its graph alone."""
    before = ["input"]
    found: dict[str, str] = {}

    def add(destination: str, ours: str, sources: list[str]) -> None:
        found.update({f"{s}->{destination}": f"{s}->{ours}" for s in sources})

    for layer in range(graph.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(graph.n_heads)]
        for place, head in enumerate(heads):
            group = f"a{layer}.kv{place * graph.n_kv_heads // graph.n_heads}"
            for part in "qkv":
                shared = graph.n_kv_heads < graph.n_heads and part != "q"
                end = f"<{part}>" if graph.split_qkv else ""
                add(f"{head}<{part}>", (group if shared else head) + end, before)
        mlp = f"m{layer}"
        add(mlp, mlp, before if graph.parallel else before + heads)
        before = [*before, *heads, mlp]
    add("logits", "logits", before)
    return found


def write(what: Circuit | EdgeScores, ending: str) -> Path:
    path = Path(tempfile.mkdtemp()) / f"circuit{ending}"
    what.to_mib(path, d_model=20)
    return path


def by_name(path: Path) -> dict[str, tuple[float, bool]]:
    """Score and place in the circuit of every edge of a file, by EAP-IG's name."""
    if path.suffix == ".json":
        edges = json.loads(path.read_text())["edges"]
        return {name: (edge["score"], edge["in_graph"]) for name, edge in edges.items()}
    document = torch.load(path, weights_only=True)
    return {
        f"{source}->{destination}": (
            float(document["edges_scores"][row, column]),
            bool(document["edges_in_graph"][row, column]),
        )
        for row, source in enumerate(document["src_nodes"])
        for column, destination in enumerate(document["dst_nodes"])
    }


# -------------------------------------------------------------------------------------- both ways


@given(graph=graphs, share=shares.filter(bool), seed=seeds, ending=endings)
def test_a_circuit_comes_back(graph, share, seed, ending):
    circuit = random_circuit(graph, share, seed) | Circuit.from_edges(graph, ["input->logits"])
    found = Circuit.from_mib(write(circuit, ending), graph)
    assert found == circuit
    assert found.metadata == {"imported_from": f"circuit{ending}", "d_model": 20}


@given(graph=graphs, seed=seeds, ending=endings)
def test_scores_come_back(graph, seed, ending):
    scores = random_scores(graph, seed)
    path = write(scores, ending)
    assert torch.equal(EdgeScores.from_mib(path, graph).tensor, scores.tensor)
    mean = EdgeScores.from_mib(path, graph, shared="mean").tensor
    torch.testing.assert_close(mean, scores.tensor)
    with pytest.raises(ValueError, match=r"holds only scores.*from_mib\(path, graph\)\.top\(k\)"):
        Circuit.from_mib(path, graph)


@given(seed=seeds, width=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]), ending=endings, data=st.data())
def test_learned_rankings_have_one_order_by_score_and_by_magnitude(seed, width, ending, data):
    """Also where a shift in float32 would make scores equal, and where some are equal."""
    scores = random_scores(GROUPED, seed)
    values = scores.tensor.sign() + width * scores.tensor if seed % 2 else width * scores.tensor
    values[data.draw(st.lists(st.integers(0, GROUPED.n_edges - 1)))] = -2.0
    scores = EdgeScores(GROUPED, values, by_magnitude=False)
    edges = by_name(write(scores, ending))
    written = torch.tensor([edges[name][0] for name in mib_edges(GROUPED)])
    ours = torch.tensor([scores[edge] for edge in mib_edges(GROUPED).values()])
    for theirs in (written, written.abs()):
        assert torch.equal(theirs[:, None] < theirs, ours[:, None] < ours)
    assert EdgeScores.from_mib(write(scores, ending), GROUPED).top(12) == scores.top(12)


def test_learned_rankings_above_zero_are_written_as_they_are():
    scores = EdgeScores(GROUPED, random_scores(GROUPED, 0).tensor.abs(), by_magnitude=False)
    assert torch.equal(EdgeScores.from_mib(write(scores, ".pt"), GROUPED).tensor, scores.tensor)
    same = EdgeScores(GROUPED, torch.full((GROUPED.n_edges,), -1.0), by_magnitude=False)
    assert (EdgeScores.from_mib(write(same, ".pt"), GROUPED).tensor == 1).all()


def test_what_is_predicted_of_a_learned_ranking_is_what_its_file_scores(tmp_path):
    model = model_zoo.load("bridge-llama-gqa")
    graph, task = EdgeGraph.from_model(model), model_zoo.pairs(model, 3)
    scores = EdgeScores(graph, random_scores(graph, 0).tensor - 0.5, by_magnitude=False)
    scores.to_mib(tmp_path / "f.pt", d_model=20)
    settings = {"shares": (0.05, 0.3, 1.0)}
    predicted = mib_faithfulness(model, scores, task, **settings)
    found = mib_faithfulness(model, EdgeScores.from_mib(tmp_path / "f.pt", graph), task, **settings)
    assert found == predicted


@given(graph=graphs, seed=seeds)
def test_both_endings_say_the_same(graph, seed):
    scores = random_scores(graph, seed)
    json_file, pt_file = by_name(write(scores, ".json")), by_name(write(scores, ".pt"))
    for name, (score, kept) in json_file.items():
        assert pt_file[name] == (pytest.approx(score), kept)
    assert all(value == (0, False) for name, value in pt_file.items() if name not in json_file)


@pytest.mark.parametrize("ending", [".json", ".pt"])
@pytest.mark.parametrize("name", HELD)
def test_the_file_has_eap_igs_edges(name, ending):
    graph = HELD[name]
    circuit, scores = random_circuit(graph, 0.3, 1), random_scores(graph, 1)
    of_circuit, of_scores = by_name(write(circuit, ending)), by_name(write(scores, ending))
    expected = mib_edges(graph)
    if ending == ".json":
        assert set(of_circuit) == set(expected)
    for theirs, ours in expected.items():
        assert of_circuit[theirs] == (float(ours in circuit), ours in circuit)
        assert of_scores[theirs] == (pytest.approx(scores[ours]), False)


def test_the_layout_of_both_files():
    circuit = Circuit.from_edges(GROUPED, ["input->a0.kv1<v>", "a0.h3->a1.h0<q>", "m1->logits"])
    document = json.loads(write(circuit, ".json").read_text())
    config = {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 20}
    assert document["cfg"] == config and set(document) == {"cfg", "nodes", "edges"}
    in_graph = {name for name, node in document["nodes"].items() if node["in_graph"]}
    assert set(document["nodes"]) == {*GROUPED.sources, "logits"}
    assert in_graph == {"input", "a0.h3", "logits"}  # nothing enters m1, a1.h0 leads nowhere
    kept = [name for name, edge in document["edges"].items() if edge["in_graph"]]
    shared = ["input->a0.h2<v>", "input->a0.h3<v>"]
    assert kept == [*shared, "a0.h3->a1.h0<q>", "m1->logits"]

    tensors = torch.load(write(circuit, ".pt"), weights_only=True)
    assert tensors["cfg"] == config
    assert tensors["src_nodes"][:6] == ["input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"]
    assert tensors["dst_nodes"][3:6] == ["a0.h3<q>", "a0.h0<k>", "a0.h1<k>"]
    assert tensors["dst_nodes"][11:14] == ["a0.h3<v>", "m0", "a1.h0<q>"]
    assert tensors["edges_scores"].shape == tensors["edges_in_graph"].shape == (11, 27)
    assert tensors["edges_in_graph"].dtype == torch.bool
    assert tensors["nodes_in_graph"].tolist() == [name in in_graph for name in GROUPED.sources]


def test_methods_note_the_width_that_files_record(tmp_path):
    model = model_zoo.load("bridge-llama-gqa")
    scores = discover(model, model_zoo.pairs(model, 2), method="eap")
    for what in (scores, scores.top(5)):
        what.to_mib(tmp_path / "found.json")
        assert json.loads((tmp_path / "found.json").read_text())["cfg"]["d_model"] == 20
    found = Circuit.from_mib(tmp_path / "found.json", EdgeGraph.from_model(model))
    assert found == scores.top(5)


# ----------------------------------------------------------------- budgets that end inside a group


@pytest.mark.parametrize("name", HELD)
def test_edges_count_for_what_the_file_has(name):
    graph = HELD[name]
    owners = list(mib_edges(graph).values())
    expected = [owners.count(edge) for edge in graph.edges]
    assert edge_counts(graph, "mib").tolist() == expected


@given(seed=seeds, budget=st.integers(1, 120), data=st.data(), ending=endings)
def test_eap_igs_top_edges_of_our_scores(seed, budget, data, ending):
    """Its top n are n of its edges, any of equal ones; whole, they are our top n in its count."""
    graph = GROUPED
    scores = random_scores(graph, seed)
    path = write(scores, ending)
    edges = by_name(path)
    ours = mib_edges(graph)
    drawn = data.draw(st.permutations(sorted(ours)))
    chosen = sorted(drawn, key=lambda name: -abs(edges[name][0]))[:budget]
    put_in_graph(path, set(chosen))
    kept = {edge: sum(ours[name] == edge for name in chosen) for edge in graph.edges}
    copies = dict(zip(graph.edges, edge_counts(graph, "mib").tolist(), strict=True))
    split = [edge for edge in graph.edges if 0 < kept[edge] < copies[edge]]
    assert len(split) <= 1
    wanted = scores.top(budget, convention="mib")
    assert sum(copies[edge] for edge in wanted.edges) == budget - sum(kept[e] for e in split)
    if not split:
        assert Circuit.from_mib(path, graph) == wanted
        return
    with pytest.raises(ValueError, match=rf"keeps {split[0]} for some .*shared='all'"):
        Circuit.from_mib(path, graph)
    for shared, does in (("all", "leaves them out"), ("any", "keeps them whole")):
        has = sum(copies[e] for e in wanted.edges) + (shared == "any") * copies[split[0]]
        message = rf"has {budget} edges .*keeps 1 of .*'{shared}' {does}: the circuit has {has} of"
        with pytest.warns(UserWarning, match=message):
            found = Circuit.from_mib(path, graph, shared=shared)
        border = Circuit.from_edges(graph, split if shared == "any" else [])
        assert found == wanted | border


def put_in_graph(path: Path, chosen: set[str]) -> None:
    """Mark these edges of a file, and no others, as in the graph."""
    if path.suffix == ".json":
        document = json.loads(path.read_text())
        for name, edge in document["edges"].items():
            edge["in_graph"] = name in chosen
        path.write_text(json.dumps(document))
        return
    document = torch.load(path, weights_only=True)
    for row, source in enumerate(document["src_nodes"]):
        for column, destination in enumerate(document["dst_nodes"]):
            document["edges_in_graph"][row, column] = f"{source}->{destination}" in chosen
    torch.save(document, path)


def test_a_circuit_that_counts_more_over_there_says_so(tmp_path):
    edges = ["input->a0.kv1<v>", "a0.h3->a1.h0<q>", "m1->logits"]
    grouped = Circuit.from_edges(GROUPED, edges)
    with pytest.warns(UserWarning, match=r"c.json: the circuit's 3 edges are 4 in EAP-IG's and"):
        grouped.to_mib(tmp_path / "c.json", d_model=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Circuit.from_edges(GROUPED, edges[1:]).to_mib(tmp_path / "c.json", d_model=20)
    with pytest.raises(ValueError, match="shared='sum': expected one of same, all, any"):
        Circuit.from_mib(tmp_path / "c.json", GROUPED, shared="sum")
    scores = random_scores(GROUPED, 0)
    most = int(edge_counts(GROUPED, "mib").sum())
    assert scores.top(most, convention="mib").n_edges == GROUPED.n_edges
    with pytest.raises(ValueError, match=f"n_edges={most + 1}: expected a whole number from 1 to"):
        scores.top(most + 1, convention="mib")


# -------------------------------------------------------------------------------- files of others


@pytest.fixture
def document():
    circuit = random_circuit(GROUPED, 0.4, 0)
    return json.loads(write(circuit, ".json").read_text())


def read(document: dict, graph: EdgeGraph = GROUPED) -> Circuit:
    path = Path(tempfile.mkdtemp()) / "theirs.json"
    path.write_text(json.dumps(document))
    return Circuit.from_mib(path, graph)


def test_older_files_have_bare_nodes_and_no_width(document):
    expected = read(document)
    document["nodes"] = {name: node["in_graph"] for name, node in document["nodes"].items()}
    del document["cfg"]["d_model"]
    assert read(document) == expected == random_circuit(GROUPED, 0.4, 0)
    assert read(document).metadata == {"imported_from": "theirs.json"}


def test_heads_of_a_group_must_agree_on_an_edge(document):
    edge = document["edges"]["m0->a1.h2<k>"]
    edge["in_graph"] = not edge["in_graph"]
    with pytest.raises(ValueError, match=r"keeps m0->a1.kv1<k> for some of its 2 copies and not"):
        read(document)


def test_different_scores_of_a_group_are_put_together_as_told(tmp_path):
    path = tmp_path / "theirs.json"
    scores = random_scores(GROUPED, 3)
    scores.to_mib(path, d_model=20)
    document = json.loads(path.read_text())
    document["edges"]["input->a1.h0<v>"]["score"] = 5.0
    document["edges"]["input->a1.h1<v>"]["score"] = -2.0
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"different scores for the 2 copies of input->a1.kv0<v>"):
        EdgeScores.from_mib(path, GROUPED)
    assert EdgeScores.from_mib(path, GROUPED, shared="sum")["input->a1.kv0<v>"] == 3.0
    assert EdgeScores.from_mib(path, GROUPED, shared="mean")["input->a1.kv0<v>"] == 1.5
    with pytest.raises(ValueError, match="shared='max': expected one of same, sum, mean"):
        EdgeScores.from_mib(path, GROUPED, shared="max")


def test_sum_is_what_eap_gives_for_a_shared_edge(tmp_path):
    """A model whose heads share keys, and the same one with a copy of the key for each head."""
    shared, copied = (llama(n_kv_heads) for n_kv_heads in (2, 4))
    weights = shared.state_dict()
    for name in [name for name in weights if "k_proj" in name or "v_proj" in name]:
        groups = weights[name].view(2, 8, *weights[name].shape[1:])  # [group, d_head, ...]
        weights[name] = groups.repeat_interleave(2, 0).flatten(0, 1)
    copied.load_state_dict(weights)
    task = model_zoo.pairs(bridge(shared), 3)
    expected = discover(bridge(shared), task, method="eap")
    discover(bridge(copied), task, method="eap").to_mib(tmp_path / "file.pt")
    summed = EdgeScores.from_mib(tmp_path / "file.pt", expected.graph, shared="sum")
    torch.testing.assert_close(summed.tensor, expected.tensor, atol=1e-5, rtol=1e-3)


def llama(n_kv_heads: int) -> Any:
    config = model_zoo._config("llama-gqa")
    config.num_key_value_heads = n_kv_heads
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model_zoo.randomise(model, 0)
    return model


def bridge(model: Any) -> Any:
    return build_bridge_from_module(
        copy.deepcopy(model), "LlamaForCausalLM", hf_config=model.config, model_name="llama"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["cfg"].update(n_layers=3), "its n_layers is 3, this graph's 2"),
        (lambda d: d["cfg"].update(n_heads=8), "its n_heads is 8, this graph's 4"),
        (lambda d: d["cfg"].update(parallel_attn_mlp=True), "parallel_attn_mlp is True, this"),
        (lambda d: d["cfg"].pop("n_heads"), "its 'cfg' has no n_heads"),
        (lambda d: d.pop("cfg"), "it has no 'cfg'"),
        (lambda d: d.pop("edges"), "it needs 'nodes' and 'edges'"),
        (
            lambda d: d["nodes"].update({"a9.h0": True}),
            "nodes that this graph does not have: 'a9.h0'",
        ),
        (
            lambda d: d["edges"].update({"m0->a0.h0<q>": {"score": 0, "in_graph": False}}),
            "edges that this graph does not have: 'm0->a0.h0<q>'",
        ),
        (lambda d: d["edges"].pop("m0->logits"), "edges missing: 'm0->logits'.*write it again"),
        (lambda d: d.update(edges={}), "edges missing: .* and .* more"),
        (lambda d: d["edges"]["m0->logits"].pop("score"), "an edge needs a number 'score'"),
        (lambda d: d["edges"]["m0->logits"].update(in_graph="yes"), "in_graph is 'yes'"),
        (lambda d: d["edges"].update({"m0->logits": 3}), "an edge needs a number 'score'"),
        (
            lambda d: d["nodes"]["m0"].update(neurons=[True, False]),
            "is a circuit of neurons",
        ),
    ],
)
def test_a_json_file_that_does_not_fit_is_refused(document, change, message):
    change(document)
    with pytest.raises(ValueError, match=message) as error:
        read(document)
    assert "theirs.json" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"src_nodes": None}, "it has no 'src_nodes'"),
        ({"dst_nodes": ["logits"]}, "dst_nodes missing: 'a0.h0<q>', 'a0.h1<q>'"),
        ({"src_nodes": ["input", "a7.h7"]}, "src_nodes that this graph does not have: 'a7.h7'"),
        ({"src_nodes": list(reversed(PLAIN.sources))}, "not in EAP-IG's order"),
        ({"edges_scores": torch.zeros(3, 3)}, r"edges_scores is \(3, 3\), expected a tensor"),
        ({"edges_in_graph": None}, "edges_in_graph is NoneType, expected a tensor"),
        ({"neurons_in_graph": torch.eye(7)}, "is a circuit of neurons"),
        ({"cfg": {"n_layers": 2}}, "its 'cfg' has no n_heads"),
    ],
)
def test_a_pt_file_that_does_not_fit_is_refused(tmp_path, changes, message):
    path = write(random_circuit(PLAIN, 0.5, 0), ".pt")
    document = torch.load(path, weights_only=True) | changes
    torch.save({key: value for key, value in document.items() if value is not None}, path)
    with pytest.raises(ValueError, match=message):
        Circuit.from_mib(path, PLAIN)


def test_cells_that_are_no_edges_are_left_alone():
    """EAP-IG marks them where it keeps whole nodes."""
    circuit = random_circuit(PLAIN, 0.5, 0)
    path = write(circuit, ".pt")
    document = torch.load(path, weights_only=True)
    unreal = torch.ones_like(document["edges_in_graph"])
    for name in mib_edges(PLAIN):
        source, destination = name.split("->")
        row, column = (
            document["src_nodes"].index(source),
            document["dst_nodes"].index(destination),
        )
        unreal[row, column] = False
    torch.save(document | {"edges_in_graph": document["edges_in_graph"] | unreal}, path)
    assert Circuit.from_mib(path, PLAIN) == circuit


class Trap:
    def __reduce__(self):
        return (print, ("a file's code has run",))


def test_no_code_of_a_file_is_run(tmp_path, capsys):
    path = tmp_path / "trap.pt"
    torch.save({"cfg": Trap()}, path)
    with pytest.raises(ValueError, match="no .pt file of tensors and plain values"):
        Circuit.from_mib(path, PLAIN)
    assert "has run" not in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("ending", [".json", ".pt"])
def test_a_file_cut_short_is_refused(ending, share):
    path = write(random_circuit(PLAIN, 0.5, 0), ending)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="cut short|or a damaged one"):
        Circuit.from_mib(path, PLAIN)


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "circuit.json"
    for name, message in (
        ("two-embeddings", "have one input, this one has two"),
        ("attention-only", "have an MLP in every layer, this model has none"),
    ):
        with pytest.raises(ValueError, match=message):
            random_circuit(GRAPHS[name], 0.5, 0).to_mib(path, d_model=20)
        with pytest.raises(ValueError, match=message):
            Circuit.from_mib(path, GRAPHS[name])
    with pytest.raises(ValueError, match=r"give to_mib\(path, d_model=model.cfg.d_model\)"):
        random_circuit(PLAIN, 0.5, 0).to_mib(path)
    with pytest.raises(ValueError, match="end in .json or .pt"):
        random_circuit(PLAIN, 0.5, 0).to_mib(tmp_path / "circuit.txt", d_model=20)
    with pytest.raises(FileNotFoundError):
        Circuit.from_mib(path, PLAIN)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- networkx


@given(
    graph=st.sampled_from(sorted(GRAPHS)).map(GRAPHS.__getitem__),
    share=st.floats(0.03, 0.5),
    seed=seeds,
)
def test_paths_of_the_networkx_graph_are_those_of_alive_edges(graph, share, seed):
    networkx = pytest.importorskip("networkx")
    circuit = random_circuit(graph, share, seed)
    found = circuit.to_networkx()
    edges = [(a, b) for a, b, kind in found.edges(data="kind") if kind == "edge"]
    assert {f"{a}->{b}" for a, b in edges} == set(circuit.edges)
    assert networkx.is_directed_acyclic_graph(found)
    inputs = [name for name in graph.sources[: graph.n_inputs] if name in found]
    reached = set(inputs).union(*(networkx.descendants(found, name) for name in inputs))
    leads = {"logits"} | networkx.ancestors(found, "logits")
    alive = {f"{a}->{b}" for a, b in edges if a in reached and b in leads}
    assert alive == set(circuit.without_dead_edges().edges)


def test_nodes_say_what_they_are():
    edges = ["input->a0.kv0<k>", "a0.h1->m1", "m1->logits"]
    nodes = Circuit.from_edges(GROUPED, edges).to_networkx().nodes(data=True)
    assert dict(nodes) == {
        "input": {"kind": "input", "layer": -1},
        "logits": {"kind": "logits", "layer": 2},
        "a0.kv0<k>": {"kind": "key", "layer": 0},
        "a0.h0": {"kind": "head", "layer": 0},
        "a0.h1": {"kind": "head", "layer": 0},
        "m1": {"kind": "mlp", "layer": 1},
    }


def test_without_networkx_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match="pip install networkx"):
        random_circuit(PLAIN, 0.5, 0).to_networkx()
