"""Other circuit libraries give the same numbers: same model, same pairs, same edges.

auto-circuit is no dependency; benchmarks/peers/README.md says how to install it. Without it, its
tests are skipped. TransformerLens' own attribution patching comes with it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import model_zoo
from torch import Tensor

from tl_edgeprune import Circuit, EdgeGraph, Task, discover, masked, models, tasks
from tl_edgeprune.methods.acdc import acdc

GPT2, TRACR = "hooked-gpt2-ln", ("tracr-xproportion", "tracr-reverse")
MODELS = (GPT2, *TRACR)
SIZES = (1, 3, 10, 20)  # and shares of the whole, below


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    """benchmarks/peers/auto_circuit.py, under a name that does not hide the library's own."""
    pytest.importorskip("auto_circuit", reason="auto-circuit is not installed")
    if model_zoo.HookedTransformer is None:
        pytest.skip("auto-circuit needs HookedTransformer, which TransformerLens 4 has not")
    path = Path(__file__).parents[2] / "benchmarks" / "peers" / "auto_circuit.py"
    spec = importlib.util.spec_from_file_location("peers_auto_circuit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_and_pairs(name: str) -> tuple[Any, Task]:
    """A model and pairs of one length, read at the last position, an answer and a distractor each.

    Tracr's logits have one column for xproportion: answer and distractor then are the same.
    """
    if name == GPT2:
        model = model_zoo.load(name)
        columns = (3, 5)
    else:
        model = models.load(name, cls="hooked", device="cpu")
        columns = (0, model.cfg.d_vocab_out - 1)
    task = _of_one_length(model_zoo.pairs(model) if name == GPT2 else tasks.load(name, model, 24))
    n = len(task)
    last = [torch.tensor([len(tokens) - 1]) for tokens in task.clean]
    answers, distractors = ([torch.tensor([column])] * n for column in columns)
    return model, Task(task.name, task.clean, task.corrupted, last, answers, distractors)


def _of_one_length(task: Task) -> Task:
    longest = max(len(tokens) for tokens in task.clean)
    return task.subset([i for i, tokens in enumerate(task.clean) if len(tokens) == longest])


def minus_answer(logits: Tensor, full: Tensor, batch: Any) -> Tensor:
    """Minus the logit of the answer: an objective that one output column is enough for."""
    return -logits.gather(2, batch.answers.unsqueeze(-1))[:, 0, 0]


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value."""
    assert expected.abs().max() > 0
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"off by {error:.2g} of the largest value"


# ----------------------------------------------------------------------------- auto-circuit


@pytest.mark.parametrize("name", MODELS)
def test_auto_circuit_has_the_same_edges(peer: ModuleType, name: str) -> None:
    model, _ = model_and_pairs(name)
    graph = EdgeGraph.from_model(model)
    assert len(peer.places(peer.wrapped(model), graph)) == graph.n_edges


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batches", [1, 2])
def test_auto_circuit_gives_the_same_eap(peer: ModuleType, name: str, batches: int) -> None:
    """Its masks ablate, so their gradient is the score; batches' means add up there."""
    model, task = model_and_pairs(name)
    task = task.subset(list(range(len(task) - len(task) % batches)))
    scores = discover(model, task, method="eap", objective=minus_answer)
    wrapped = peer.wrapped(model)
    theirs = peer.eap(wrapped, peer.loader(task, len(task) // batches), "avg_val")
    theirs = peer.as_vector(theirs, wrapped, scores.graph)
    assert_equal_up_to_rounding(theirs / batches, scores.tensor)


def test_auto_circuit_gives_the_same_eap_by_logit_difference(peer: ModuleType) -> None:
    model, task = model_and_pairs(GPT2)
    scores, wrapped = discover(model, task, method="eap"), peer.wrapped(model)
    theirs = peer.as_vector(peer.eap(wrapped, peer.loader(task)), wrapped, scores.graph)
    assert_equal_up_to_rounding(theirs, scores.tensor)


@pytest.mark.parametrize("name", MODELS)
def test_auto_circuit_gives_the_same_logits_of_circuits(peer: ModuleType, name: str) -> None:
    model, task = model_and_pairs(name)
    graph, wrapped, batches = EdgeGraph.from_model(model), peer.wrapped(model), peer.loader(task)
    batch = next(task.batches(len(task)))
    scores = 1 + torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(0))
    sizes = sorted({*SIZES, graph.n_edges // 2, graph.n_edges - 1})
    theirs = peer.circuit_logits(wrapped, batches, peer.as_scores(scores, wrapped, graph), sizes)
    for size, expected in zip(sizes, theirs, strict=True):
        circuit = Circuit.top(graph, scores, size)
        with torch.no_grad(), masked(model, circuit, corrupted=batch.corrupted):
            assert_equal_up_to_rounding(model(batch.clean)[:, -1], expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threshold", [0.001, 0.01, 0.03])
def test_auto_circuit_keeps_the_same_edges_by_acdc(
    peer: ModuleType, name: str, threshold: float
) -> None:
    """In the same order of visits; an edge whose removal costs just the threshold may differ."""
    model, task = model_and_pairs(name)
    graph, wrapped = EdgeGraph.from_model(model), peer.wrapped(model)
    measure, objective = ("kl_div", "kl") if name == GPT2 else ("mse", "mse")
    peer.in_order(wrapped, reversed(graph.edges))
    theirs = peer.acdc(wrapped, peer.loader(task), graph, threshold, measure)
    ours = acdc(model, task, threshold=threshold, search="exact", objective=objective)
    assert set(ours.edges) == set(theirs.edges)


# ----------------------------------------------------- TransformerLens' own attribution patching


def node_name(node: Any) -> str:
    """Its nodes' names as ours."""
    names = {"embed": "input", "logits": "logits"}
    if node.kind in names:
        return names[node.kind]
    if node.head is None:
        return f"m{node.layer}"
    part = "" if node.kind == "attn_head_out" else f"<{node.kind[0]}>"
    return f"a{node.layer}.h{node.head}{part}"


@pytest.fixture(scope="module")
def attribution_patching() -> ModuleType:
    return pytest.importorskip(
        "transformer_lens.tools.analysis.attribution_patching",
        reason="this TransformerLens has no attribution patching",
    )


@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-llama"])
@pytest.mark.parametrize("granularity", ["node", "edge"])
def test_transformer_lens_gives_the_same_attribution(
    attribution_patching: ModuleType, name: str, granularity: str
) -> None:
    """Its gradient is the corrupted prompt's, so the pair is exchanged; it scores each position."""
    try:
        config = attribution_patching.EdgeAttributionConfig(granularity=granularity)
    except NotImplementedError as error:
        pytest.skip(str(error))
    model = model_zoo.load(name)
    task = model_zoo.pairs(model, 1)
    exchanged = Task("exchanged", task.corrupted, task.clean, *_read(task))
    scores = discover(model, exchanged, method="eap")
    result = attribution_patching.attribution_patch(
        model,
        task.clean[0][None],
        task.corrupted[0][None],
        lambda logits: logits[0, -1, 5] - logits[0, -1, 3],  # what our objective minimises
        config,
    )
    nodes = scores.graph.sources
    ours = dict.fromkeys(nodes, 0.0)
    for edge, score in zip(scores.graph.edges, scores.tensor.tolist(), strict=True):
        ours[edge.partition("->")[0]] += score
    theirs = dict.fromkeys(nodes, 0.0)
    for node, score in result.node_scores.items():
        theirs[node_name(node)] += score
    assert set(ours) == set(theirs)
    assert_equal_up_to_rounding(_vector(theirs, nodes), _vector(ours, nodes))
    if granularity == "edge":
        theirs = dict.fromkeys(scores.graph.edges, 0.0)
        for (source, destination), score in result.edge_scores.items():
            theirs[f"{node_name(source)}->{node_name(destination)}"] += score
        assert_equal_up_to_rounding(_vector(theirs, scores.graph.edges), scores.tensor)


def _read(task: Task) -> tuple[Any, Any, Any]:
    return task.read_positions, task.answers, task.distractors


def _vector(values: dict[str, float], names: Any) -> Tensor:
    assert set(values) == set(names)
    return torch.tensor([values[name] for name in names])
