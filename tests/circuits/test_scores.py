"""Scores: circuits from them, the greedy construction against a naive one, files."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import model_zoo
from test_circuit import GRAPHS, graphs, heads_behind, seeds

from tl_edgeprune import Circuit, EdgeScores, discover
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.runs.checkpoint import SavedState
from tl_edgeprune.runs.checkpoint import save as save_checkpoint

GRAPH = GRAPHS["grouped"]
SMOLLM2 = EdgeGraph(30, 9, 3)


def random_scores(graph: EdgeGraph, seed: int, **fields) -> EdgeScores:
    """Scores of both signs, many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-9, 10, (graph.n_edges,), generator=generator) / 4
    return EdgeScores(graph, values, **fields)


# ---------------------------------------------------------------------------------------- circuits


@given(graph=graphs, seed=seeds, share=st.floats(0.02, 1), absolute=st.booleans())
def test_alive_takes_dead_edges_away_after_the_choice(graph, seed, share, absolute):
    scores = random_scores(graph, seed, metadata={"task": "t"})
    k = max(1, round(share * graph.n_edges))
    for choose, size in ((scores.top, k), (scores.greedy, k), (scores.threshold, 1.5)):
        circuit = choose(size, absolute=absolute)
        alive = choose(size, absolute=absolute, alive=True)
        assert alive == circuit.without_dead_edges()
        assert alive.metadata == {"task": "t"}


@given(seed=seeds)
def test_learned_rankings_are_taken_as_they_are(seed):
    """The lowest log alphas are the edges to remove first, however large they are."""
    effects = random_scores(GRAPH, seed)
    learned = EdgeScores(GRAPH, effects.tensor, by_magnitude=False)
    for method, size in (("top", 7), ("greedy", 7), ("threshold", 0.5)):
        of_effects, of_learned = getattr(effects, method), getattr(learned, method)
        assert of_effects(size) == of_effects(size, absolute=True)
        assert of_learned(size) == of_effects(size, absolute=False)
        assert of_learned(size, absolute=True) == of_effects(size)


def test_edge_prunings_scores_rank_by_log_alpha():
    model = model_zoo.load("bridge-gpt2")
    settings = {"steps": 3, "lr": 2.0, "progress": False}
    scores = discover(model, model_zoo.pairs(model, 4), method="edge-pruning", **settings)
    assert bool((scores.tensor < 0).any())
    assert scores.top(9) == Circuit.top(scores.graph, scores.tensor, 9)


def test_edge_pruning_starts_from_the_ranks_of_a_former_run():
    model = model_zoo.load("bridge-gpt2")
    graph = EdgeGraph.from_model(model)
    generator = torch.Generator().manual_seed(0)
    former = EdgeScores(graph, torch.randn(graph.n_edges, generator=generator), by_magnitude=False)
    settings = {"init_scores": former, "steps": 1, "lr": 1e-9, "progress": False}
    again = discover(model, model_zoo.pairs(model, 4), method="edge-pruning", **settings)
    assert torch.equal(again.tensor.argsort(), former.tensor.argsort())


# ----------------------------------------------------------------------------------------- greedy


def greedy_by_definition(scores: EdgeScores, k: int, absolute: bool) -> set[str]:
    """Names alone: look through all edges for the best that leads on, k times."""
    graph = scores.graph
    values = {e: abs(scores[e]) if absolute else scores[e] for e in graph.edges}
    chosen: list[str] = []
    while len(chosen) < k:
        left = {edge.split("->")[0] for edge in chosen}
        open_ = [
            edge
            for edge in graph.edges
            if edge not in chosen
            and (edge.endswith("->logits") or left & set(heads_behind(edge.split("->")[1], graph)))
        ]
        if not open_:
            break
        chosen.append(max(open_, key=lambda edge: values[edge]))  # the first of equal ones
    return set(chosen)


@given(graph=graphs, seed=seeds, share=st.floats(0.01, 0.6), absolute=st.booleans())
def test_greedy_takes_the_best_edge_that_leads_to_the_logits(graph, seed, share, absolute):
    scores = random_scores(graph, seed)
    k = max(1, round(share * graph.n_edges))
    circuit = scores.greedy(k, absolute=absolute)
    assert set(circuit.edges) == greedy_by_definition(scores, k, absolute)
    assert circuit.n_edges == k


@given(graph=graphs, seed=seeds)
def test_every_greedy_edge_leads_to_the_logits(graph, seed):
    circuit = random_scores(graph, seed).greedy(max(1, graph.n_edges // 5))
    left = {edge.split("->")[0] for edge in circuit.edges}
    for edge in circuit.edges:
        destination = edge.split("->")[1]
        assert destination == "logits" or left & set(heads_behind(destination, graph))


def test_greedy_of_all_edges_is_the_whole_graph_and_sizes_are_checked():
    scores = random_scores(GRAPH, 0)
    assert scores.greedy(GRAPH.n_edges).n_edges == GRAPH.n_edges
    with pytest.raises(ValueError, match=f"n_edges={GRAPH.n_edges + 1}: expected a whole number"):
        scores.greedy(GRAPH.n_edges + 1)
    with pytest.raises(ValueError, match="n_edges=0"):
        scores.greedy(0)


def test_greedy_is_fast_on_a_large_graph():
    assert SMOLLM2.n_edges == 70_651
    scores = EdgeScores(SMOLLM2, torch.randn(70_651, generator=torch.Generator().manual_seed(0)))
    times = []
    for k in (1000, 70_651):
        started = time.process_time()
        assert scores.greedy(k).n_edges == k
        times.append(time.process_time() - started)
    assert max(times) < 2  # 0.3 s on one core; a scan of all edges for each takes minutes


# ----------------------------------------------------------------------------------------- on disk


@given(
    graph=graphs,
    seed=seeds,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    learned=st.booleans(),
)
def test_a_file_gives_the_scores_back(graph, seed, dtype, learned):
    metadata = {"method": "eap", "seed": seed, "settings": {"lr": 0.1, "path": "é", "x": None}}
    tensor = random_scores(graph, seed).tensor.to(dtype)
    scores = EdgeScores(graph, tensor, metadata, by_magnitude=not learned)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "scores.safetensors"
        scores.save(path)
        loaded = EdgeScores.load(path)
        assert [file.name for file in path.parent.iterdir()] == ["scores.safetensors"]
    assert torch.equal(loaded.tensor, scores.tensor) and loaded.tensor.dtype == dtype
    assert loaded.graph == graph and loaded.metadata == metadata
    assert loaded.by_magnitude == scores.by_magnitude


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "scores.safetensors"
    random_scores(GRAPH, 0).save(path)
    return path


def rewrite(path: Path, changes: dict, tensors: dict | None = None) -> None:
    """The saved file with another document inside; a value of None removes the key."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    document = json.loads(header["__metadata__"]["tl_edgeprune"]) | changes
    document = {key: value for key, value in document.items() if value is not None}
    tensors = tensors or {"scores": random_scores(GRAPH, 0).tensor}
    save_file(tensors, path, {"tl_edgeprune": json.dumps(document)})


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
def test_a_file_cut_short_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="is no file of scores, or a damaged one"):
        EdgeScores.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 0}, "has format 0, this version reads 1"),
        ({"format": None}, "has format None, this version reads 1"),
        ({"kind": "another program's"}, "Expected one written by EdgeScores.save"),
        ({"graph": None}, "is damaged: 'graph'"),
        ({"graph": {"n_layers": 2}}, "not the description of an edge graph"),
        ({"graph": {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1}}, "scores is .* of shape"),
        ({"metadata": None}, "is damaged: 'metadata'"),
        ({"metadata": 3}, "is damaged"),
        ({"by_magnitude": None}, "is damaged: 'by_magnitude'"),
    ],
)
def test_a_damaged_or_older_file_is_refused_by_name(saved, changes, message):
    rewrite(saved, changes)
    with pytest.raises(ValueError, match=message) as error:
        EdgeScores.load(saved)
    assert "scores.safetensors" in str(error.value)


def test_files_of_other_kinds_are_refused_and_a_missing_one_is_missing(saved):
    rewrite(saved, {}, {"others": torch.zeros(3)})
    with pytest.raises(ValueError, match="is damaged: 'scores'"):
        EdgeScores.load(saved)
    save_file({"scores": torch.zeros(3)}, saved)
    with pytest.raises(ValueError, match="is no file of scores"):
        EdgeScores.load(saved)
    save_checkpoint(saved, SavedState({"log_alpha": torch.zeros(3)}, {}, {}))
    with pytest.raises(ValueError, match="is no file of scores"):
        EdgeScores.load(saved)
    Circuit.from_edges(GRAPH, ["input->logits"]).save(saved)
    with pytest.raises(ValueError, match="is no file of scores"):
        EdgeScores.load(saved)
    with pytest.raises(FileNotFoundError, match="no file of scores at"):
        EdgeScores.load(saved.parent / "none.safetensors")


def test_metadata_that_json_cannot_write_leaves_the_old_file(saved):
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        EdgeScores(GRAPH, torch.zeros(GRAPH.n_edges), {"x": object()}).save(saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["scores.safetensors"]
