"""What methods, scores and comparisons refuse or warn of, before any long work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import model_zoo

from tl_edgeprune import (
    Attachment,
    Circuit,
    EdgeGraph,
    EdgePruner,
    EdgeScores,
    Neurons,
    Task,
    compare,
    discover,
    evaluate,
    masked,
    optimal_constants,
)
from tl_edgeprune.ablation.kinds import ABLATIONS
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.methods.registry import METHODS

MODEL, OTHER = "bridge-gpt2", "bridge-llama-gqa"
GRAPH = EdgeGraph(n_layers=2, n_heads=2, n_kv_heads=1)


def refused(message: str, error: type[Exception] = ValueError) -> Any:
    """A message given as plain text, `…` for what may stand between."""
    return pytest.raises(error, match=".*".join(map(re.escape, message.split("…"))))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A masked forward, but for the model's first look, is a failure."""
    for name in (MODEL, OTHER):
        with MaskedModel.attach(model_zoo.load(name)):
            pass
    monkeypatch.setattr(MaskedModel, "__call__", lambda *_, **__: pytest.fail("the model ran"))


# ---------------------------------------------------------------------------------------- methods


def test_an_unknown_method_is_told_the_known_ones(no_work: None) -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 2)
    with refused("unknown method 'eap-gi': expected one of acdc, …eap, …ugs. …eap-ig?"):
        discover(model, task, "eap-gi")
    with refused("unknown methods 'eap-gi': expected some of acdc, …eap, …ugs."):
        compare(model, task, task, ["eap-gi"], [5], progress=False)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_ablation_that_a_method_cannot_use(method: str, no_work: None) -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 2)
    settings = {"threshold": 0.1} if method == "acdc" else {}
    message = f"unknown ablation 'resample': expected one of {', '.join(ABLATIONS)}, or Constants."
    if method == "ifr":  # it removes nothing
        message = "ifr takes no ablation: expected some of graph, batch_size, progress, checkpoint."
    with refused(message):
        discover(model, task, method, ablation="resample", **settings)


@pytest.mark.parametrize("method", ["ifr", "random", "mask-ig"])
def test_an_ablation_that_a_comparison_cannot_use(method: str, no_work: None) -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 2)
    with refused(
        "unknown ablation 'resample': expected one of counterfactual, zero, zero-with-biases"
    ):
        compare(model, task, task, [method], [5], ablation="resample", progress=False)


def test_settings_that_a_method_does_not_take_or_needs(no_work: None) -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 2)
    with refused("eap-ig takes no stepz and no seed: expected some of …steps, …batch_size, pro"):
        discover(model, task, "eap-ig", stepz=3, seed=1)
    with refused("acdc needs threshold: give discover(…, 'acdc', threshold=…)."):
        discover(model, task, "acdc")
    with refused("compare: method 'acdc': acdc needs threshold"):
        compare(model, task, task, ["acdc"], progress=False)
    with refused("compare: method 'eap': eap takes no stepz: expected some of"):
        compare(model, task, task, ["eap"], [5], settings={"eap": {"stepz": 3}}, progress=False)


@pytest.mark.parametrize("threshold", [0.1, [0.1, 0.2]], ids=str)
def test_thresholds_are_for_acdc_alone(threshold: Any, no_work: None) -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 2)
    for method in ("eap", "edge-pruning"):
        with refused(f"compare: a threshold in the settings of {method!r}, which ranks all edges"):
            settings = {method: {"threshold": threshold}}
            compare(model, task, task, [method], [5], settings=settings, progress=False)
    with refused("compare: no threshold in the settings of 'acdc': expected a number, or a list"):
        compare(model, task, task, ["acdc"], settings={"acdc": {"threshold": []}}, progress=False)


# ----------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("threshold", "message"),
    [(0.0, "threshold(0) keeps every edge: the scores go from 1 to "), (1e3, "keeps no edge: the")],
)
def test_a_threshold_that_keeps_all_or_nothing_warns(threshold: float, message: str) -> None:
    scores = EdgeScores(GRAPH, torch.arange(1.0, GRAPH.n_edges + 1))
    with pytest.warns(UserWarning, match=re.escape(message)):
        scores.threshold(threshold)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores.threshold(2.0).n_edges == GRAPH.n_edges - 1
    with refused("threshold(nan): expected a number"):
        scores.threshold(float("nan"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_scores_that_are_no_numbers(bad: float, tmp_path: Path, no_work: None) -> None:
    values = torch.zeros(GRAPH.n_edges)
    values[3:5] = bad
    message = (
        f"scores hold NaN or infinite values for 2 of {GRAPH.n_edges} edges (first "
        f"{GRAPH.edges[3]}: {bad}), which cannot be ranked"
    )
    with refused(message):
        EdgeScores(GRAPH, values)
    with refused(message):
        Circuit.top(GRAPH, values, 5)
    path = tmp_path / "scores.json"
    good = EdgeScores(GRAPH, torch.arange(1.0, GRAPH.n_edges + 1))
    good.to_mib(path, d_model=8)
    path.write_text(path.read_text().replace('"score": 1.0,', f'"score": {json.dumps(bad)},'))
    with refused("scores.json: the score of input->a0.h0<q> is NaN or infinite. Score the edges"):
        EdgeScores.from_mib(path, GRAPH)


def test_scores_of_another_graph(no_work: None) -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 2)
    n = EdgeGraph.from_model(model).n_edges
    scores = EdgeScores(GRAPH, torch.rand(GRAPH.n_edges))
    with refused(f"scores of shape ({n},) for {GRAPH.n_edges} edges: expected ({GRAPH.n_edges},)"):
        EdgeScores(GRAPH, torch.rand(n))
    with refused(f"scores of shape ({n},) for {GRAPH.n_edges} edges: expected ({GRAPH.n_edges},)"):
        Circuit.top(GRAPH, torch.rand(n), 5)
    with refused(
        "init_scores are for another graph: EdgeGraph(n_layers=2…the graph of this run is EdgeGraph"
    ):
        EdgePruner(5, init_scores=scores, progress=False).fit(model, task)
    with refused("the circuit is for another model: its graph is EdgeGraph(n_layers=2"):
        evaluate(model, scores.top(5), task)


@pytest.mark.filterwarnings("ignore:.*in EAP-IG's and MIB's count:UserWarning")
@pytest.mark.parametrize("what", [Circuit, EdgeScores])
def test_a_mib_file_with_unknown_nodes_or_missing_edges(what: Any, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    scores = EdgeScores(GRAPH, torch.rand(GRAPH.n_edges))
    (scores if what is EdgeScores else scores.top(5)).to_mib(path, d_model=8)
    text = path.read_text()
    path.write_text(text.replace('"m1": {', '"m7": {'))
    with refused(
        "circuit.json: nodes that this graph does not have: 'm7'. Give the graph of the model"
    ):
        what.from_mib(path, GRAPH)
    path.write_text(text.replace('"m0->m1": {', '"m0->m1": {}, "gone": {'))
    with refused("circuit.json: edges that this graph does not have: 'gone'"):
        what.from_mib(path, GRAPH)
    start = text.index('"m0->m1"')
    path.write_text(text[:start] + text[text.index('"', text.index("}", start)) :])
    with refused("circuit.json: edges missing: 'm0->m1'. Every edge of the graph must be in"):
        what.from_mib(path, GRAPH)


# ------------------------------------------------------------------------------ what is left over


def enter(*arguments: Any, **settings: Any) -> None:
    with masked(*arguments, **settings):
        pytest.fail("not refused")


def nan(logits: torch.Tensor, full: torch.Tensor, batch: Any) -> torch.Tensor:
    return float("nan") * logits.sum((1, 2))


CALLS: list[tuple[str, Callable[[Any, Task], Any]]] = [
    (
        "compare: positions in the settings of 'eap'. Circuits whose edges have masks in spans",
        lambda model, task: compare(
            model, task, task, ["eap"], [5], settings={"eap": {"positions": "span"}}
        ),
    ),
    (
        "compare: an ablation in the settings of 'eap'. Figures under different ablations",
        lambda model, task: compare(
            model, task, task, ["eap"], [5], settings={"eap": {"ablation": "zero"}}
        ),
    ),
    (
        f"the circuit has its own graph, {GRAPH}, and graph=EdgeGraph(…) is another.",
        lambda model, task: enter(
            *(model, Circuit.from_edges(GRAPH, ["m0->m1"])),
            ablation="zero",
            graph=EdgeGraph.from_model(model),
        ),
    ),
    (
        "batches(size=0): a batch needs at least one pair.",
        lambda model, task: task.batches(0),
    ),
    (
        "eap gives NaN or infinite scores on task 'random': check the model's weights and dtype",
        lambda model, task: discover(model, task, "eap", objective=nan),
    ),
    (
        "Attachment(weight=-1.0): expected a number of 0 or more.",
        lambda model, task: Attachment(-1.0),
    ),
    (
        "Attachment(weight=nan): expected a number of 0 or more.",
        lambda model, task: Attachment(float("nan")),
    ),
    (
        "the objective is nan at step 0: try a lower lr.",
        lambda model, task: optimal_constants(model, task, objective=nan, progress=False),
    ),
    (
        "scores of neurons hold NaN, which cannot be ranked.",
        lambda model, task: Neurons.top(GRAPH, "mlp", torch.full((2, 4), float("nan")), 3),
    ),
]


@pytest.mark.parametrize(("message", "call"), CALLS, ids=[message[:24] for message, _ in CALLS])
def test_a_call_that_cannot_work(message: str, call: Callable[[Any, Task], Any]) -> None:
    model = model_zoo.load(MODEL)
    with refused(message):
        call(model, model_zoo.pairs(model, 2))


UNCHECKED = """
import sys
sys.path[:0] = {paths!r}
import torch
from support import model_zoo
from tl_edgeprune import EdgeGraph, EdgePruner, Task, masked

model = model_zoo.load({model!r})
task = model_zoo.pairs(model, 2)
mask = torch.ones(EdgeGraph.from_model(model).n_edges)
two, flat, halves = torch.ones(1, 3).long(), torch.ones(2).long(), torch.ones(2) / 2
calls = [
    lambda: EdgePruner(5).fit(model, "ioi"),
    lambda: EdgePruner("10"),
    lambda: task[0],
    lambda: Task("bad", [flat, two], [flat, two], [flat[:1]] * 2),
    lambda: Task("bad", [halves], [halves], [flat[:1]]),
    *[
        lambda wrong=wrong: masked(model, mask, corrupted=wrong).__enter__()
        for wrong in ([[1, 2]], flat, two / 2)
    ],
]
for call in calls:
    try:
        call()
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_what_is_of_another_kind_is_told_without_annotations_being_checked() -> None:
    """As users run it: here, elsewhere, wrong types end at the annotations."""
    code = UNCHECKED.format(paths=sys.path, model=MODEL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "TypeError expected a Task or a TaskStream, got str: make one with tasks.load(name, model, "
        "n=…), tasks.from_jsonl(path, model) or tasks.stream(…).",
        "TypeError n_edges='10': expected a whole number, or None.",
        "TypeError task[0]: slice a task (task[:8] is a Task); one prompt is task.clean[i].",
        "ValueError clean[1] has shape (1, 3) and type torch.int64: expected one dimension of "
        "integers.",
        "ValueError clean[0] has shape (2,) and type torch.float32: expected one dimension of "
        "integers.",
        "TypeError corrupted is a list, expected a tensor of tokens [batch, pos]: use "
        "model.to_tokens or torch.tensor first.",
        "ValueError corrupted has shape (2,) and type torch.int64, expected tokens [batch, pos].",
        "ValueError corrupted has shape (1, 3) and type torch.float32, expected tokens [batch, "
        "pos].",
    ]
