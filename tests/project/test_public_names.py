"""The names and module paths that users import."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tl_edgeprune

NAMES = """
Attachment Circuit Comparison Completeness Constants EdgeGraph EdgePruner EdgeScores EquivalenceTest
Evaluation ExactBudget Explanation FaithfulnessCurve IndependenceTest Lagrangian Minimality
MinimalityTest Neurons Optimizer Penalty PruneResult Roc Stability Task compare completeness
discover eliminate equivalence_test evaluate explain faithfulness_curve independence_test masked
mib_faithfulness minimality minimality_test models necessary_edges optimal_constants polish
possible_edges precision_recall roc stability tasks
""".split()
PATHS = {
    "cli": "main",
    "models": "load list from_tracr known_circuit train_semi_synthetic tracr semi_synthetic",
    "models.smollm2": "load_bridge",
    "tasks": "Task load list register from_jsonl from_pandas from_hf_dataset stream stream_jsonl "
    "solved keep_solved",
    "tasks.task": "Task",
    "tasks.stream": "TaskStream",
    "tasks.recipe": "register_recipe",
    "tasks.registry": "register",
    "tasks.jsonl": "from_jsonl",
    "tasks.jsonl_stream": "stream_jsonl",
    "tasks.tables": "from_pandas",
    "tasks.solved": "solved",
    "tasks.tokens": "",
    "tasks.semi_synthetic": "",
    "siit": "",
    "siit.causal": "",
    "siit.examples": "",
    "siit.training": "",
    "methods": "",
    "methods.registry": "METHODS discover",
    "objectives": "OBJECTIVES kl",
    "report": "draw_circuit plot_comparison plot_faithfulness plot_heads plot_history "
    "plot_stability to_dot write_html",
    "distributed": "started",
    "sharding": "sharded",
    "graph": "EdgeGraph",
    "graph.names": "",
    "hooks": "find_sites",
    "ablation": "Reference",
    "training": "EdgePruner ExactBudget Lagrangian Penalty Optimizer PruneResult",
    "counts": "edge_counts longest_run",
}


def in_a_fresh_process(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_public_names_are_these() -> None:
    assert sorted(tl_edgeprune.__all__) == sorted(NAMES)
    assert {*NAMES} <= {*dir(tl_edgeprune)}
    code = "\n".join(f"from tl_edgeprune import {name}; print({name!r})" for name in NAMES)
    assert in_a_fresh_process(code).split() == NAMES


def test_a_public_function_is_no_module_whatever_was_imported_before() -> None:
    for name in NAMES:
        if name not in ("models", "tasks"):
            assert callable(getattr(tl_edgeprune, name)), name


@pytest.mark.parametrize("path", PATHS)
def test_documented_modules_import_by_the_same_paths(path: str) -> None:
    module = importlib.import_module(f"tl_edgeprune.{path}")
    for name in PATHS[path].split():
        assert hasattr(module, name), name


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, tl_edgeprune; print('torch' in sys.modules, 'pandas' in sys.modules)"
    assert in_a_fresh_process(code).split() == ["False", "False"]


def test_a_name_that_there_is_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'edge_pruner'"):
        tl_edgeprune.edge_pruner  # noqa: B018


@pytest.mark.parametrize("package", ["", "report"])
def test_type_checkers_see_the_same_names(package: str) -> None:
    module = importlib.import_module(f"tl_edgeprune.{package}".rstrip("."))
    stub = Path(str(module.__file__)).with_suffix(".pyi").read_text(encoding="utf-8")
    names = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tl_edgeprune")
        for alias in node.names
    }
    assert {*names} - {"__version__"} == {*module.__all__}
    for name, path in names.items():
        where, _, attribute = path.rpartition(".")
        there = importlib.import_module(where)
        assert getattr(module, str(name)) is getattr(there, attribute)
