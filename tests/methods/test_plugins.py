"""A method, a measure and an ablation of another package, added by registration only."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import model_zoo
from support.command_line import mistake, told

import tl_edgeprune
from tl_edgeprune.ablation.kinds import ABLATIONS
from tl_edgeprune.commands.common import plugins
from tl_edgeprune.evaluation.measures import MEASURES
from tl_edgeprune.methods.registry import METHODS

PLUGIN = """
import torch

from tl_edgeprune.ablation.fixed import mean_reference
from tl_edgeprune.ablation.kinds import register as register_ablation
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.evaluation.measures import register as register_measure
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods.registry import register


@register("late-edges")
def late_edges(model, task, *, scale: float = 1.0, ablation: str = "zero") -> EdgeScores:
    graph = EdgeGraph.from_model(model)
    scores = scale * torch.arange(graph.n_edges).float()
    return EdgeScores(graph, scores, {"method": "late-edges", "ablation": ablation})


@register_measure("top_logit_gap", "top logit gap", format=".2f")
def top_logit_gap(logits, full, batch):
    return (full.amax(-1) - logits.amax(-1)).mean(-1)


@register_ablation("mean-of-first", "the mean over the first prompt", needs="prompts")
def mean_of_first(model, sites, graph, prompts):
    return mean_reference(model, sites, graph, prompts[:1], positional=False)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    """A module outside the package; what it registers is removed afterwards."""
    path = tmp_path / "late_edges.py"
    path.write_text(PLUGIN, encoding="utf-8")
    tables: tuple[dict[str, Any], ...] = (METHODS, MEASURES, ABLATIONS)
    before = [dict(table) for table in tables]
    yield path
    sys.modules.pop(f"{plugins.GROUP}.{path.stem}", None)
    for table, records in zip(tables, before, strict=True):
        table.clear()
        table.update(records)


def test_they_work_in_python(plugin: Path) -> None:
    plugins.load_plugins([str(plugin)])
    plugins.load_plugins([str(plugin)])  # a second command of the same process
    model = model_zoo.load("bridge-gpt2")
    task = model_zoo.pairs(model, 4)
    scores = tl_edgeprune.discover(model, task, "late-edges", scale=2.0)
    assert scores.tensor.tolist() == [2.0 * i for i in range(scores.graph.n_edges)]
    assert METHODS["late-edges"](model, task).metadata["method"] == "late-edges"
    with pytest.raises(ValueError, match="takes no steps: expected some of scale, ablation"):
        tl_edgeprune.discover(model, task, "late-edges", steps=3)

    circuit = scores.top(30)
    result = tl_edgeprune.evaluate(model, circuit, task, ablation="mean-of-first")
    values = result.to_dict()
    assert result.top_logit_gap == result.extra["top_logit_gap"] == values["top_logit_gap"]
    assert f"top logit gap   {result.top_logit_gap:z.2f}" in str(result).splitlines()
    assert tl_edgeprune.Evaluation.from_dict(values) == result
    alone = tl_edgeprune.evaluate(model, circuit, task.subset([0]), ablation="mean")
    same = tl_edgeprune.evaluate(model, circuit, task.subset([0]), ablation="mean-of-first")
    assert same == alone and same.kl is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = result.nothing

    found = tl_edgeprune.compare(
        model, task, task, ["late-edges", "eap"], [20], ablation="mean-of-first", progress=False
    )
    assert found.table["top_logit_gap"].notna().all() and "top_logit_gap" in str(found)
    with tl_edgeprune.masked(model, circuit, ablation="mean-of-first", prompts=task.clean[:2]):
        assert torch.isfinite(model(task.clean[0][None])).all()


def test_they_work_on_the_command_line(
    plugin: Path, llama: str, gifts: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    asked = ["discover", llama, gifts, "--method", "late-edges", "--n-edges", 20]
    assert "unknown method 'late-edges'" in mistake(*asked, "--out", out)
    with_plugin = ["--plugin", plugin]
    settings = ["--set", "scale=0.5", "--ablation", "mean-of-first"]
    result = told(*asked, "--out", out, *settings, *with_plugin)
    assert result.exit_code == 0 and "top logit gap" in result.stdout
    figures = json.loads((out / "evaluation.json").read_text())
    assert "top_logit_gap" in figures
    again = json.loads(told("evaluate", out / "circuit.json", "--json", *with_plugin).stdout)
    assert again == figures
    assert "top logit gap" in (out / "circuit.html").read_text(encoding="utf-8")
    compared = [llama, gifts, "--methods", "late-edges,random", "--sizes", 20, *settings[2:]]
    folder = tmp_path / "compare"
    result = told("compare", *compared, "--out", folder, "--json", *with_plugin)
    assert all("top_logit_gap" in row for row in json.loads(result.stdout)["rows"])
    assert "late-edges" in told("methods", *with_plugin).stdout
    assert "the mean over the first prompt" in told("ablations", *with_plugin).stdout


def test_a_plugin_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "--plugin no_such_module: no such module" in mistake(
        "methods", "--plugin", "no_such_module"
    )
    assert "no such file" in mistake("methods", "--plugin", tmp_path / "none.py")


def test_a_name_is_registered_once(plugin: Path) -> None:
    from tl_edgeprune.ablation import kinds
    from tl_edgeprune.evaluation import measures
    from tl_edgeprune.methods import registry

    with pytest.raises(ValueError, match="a method called 'eap' is registered already"):
        registry.register("eap")(lambda model, task: None)
    with pytest.raises(ValueError, match="a measure called 'kl' is registered already"):
        measures.register("kl", "KL")(lambda logits, full, batch: logits)
    with pytest.raises(ValueError, match="an ablation called 'optimal' is registered already"):
        kinds.register("optimal", "constants")(lambda model, sites, graph, prompts: None)
