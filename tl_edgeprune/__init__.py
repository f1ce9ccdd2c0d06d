"""Edge Pruning as hooks: find circuits in the transformer that you already have.

Bhaskar, Wettig, Friedman and Chen, "Finding Transformer Circuits with Edge Pruning", NeurIPS 2024.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tl_edgeprune.utils.versions import __version__ as __version__

# The public names and their modules. Each is imported on first use, since PyTorch and
# TransformerLens take seconds, which `tl-edgeprune --help` does without. __init__.pyi has the same
# names for type checkers.
_MODULES = {
    "Attachment": "training.regularisers",
    "Circuit": "circuits.circuit",
    "Comparison": "evaluation.comparison",
    "Completeness": "evaluation.knockouts",
    "Constants": "ablation.constants",
    "EdgeGraph": "graph.edge_graph",
    "EdgePruner": "training.pruner",
    "EdgeScores": "circuits.scores",
    "EquivalenceTest": "evaluation.statistics",
    "Evaluation": "evaluation.evaluate",
    "ExactBudget": "training.controllers",
    "Explanation": "evaluation.explain.explanation",
    "FaithfulnessCurve": "evaluation.faithfulness",
    "IndependenceTest": "evaluation.statistics",
    "Lagrangian": "training.controllers",
    "Minimality": "evaluation.knockouts",
    "MinimalityTest": "evaluation.hypothesis_tests",
    "Neurons": "circuits.neurons",
    "Optimizer": "training.pruner",
    "Penalty": "training.controllers",
    "PruneResult": "training.result",
    "Roc": "evaluation.roc",
    "Stability": "evaluation.stability",
    "Task": "tasks.task",
    "compare": "evaluation.compare",
    "completeness": "evaluation.knockouts",
    "discover": "methods.registry",
    "eliminate": "search.elimination",
    "equivalence_test": "evaluation.hypothesis_tests",
    "evaluate": "evaluation.evaluate",
    "explain": "evaluation.explain.explain",
    "faithfulness_curve": "evaluation.faithfulness",
    "independence_test": "evaluation.hypothesis_tests",
    "masked": "forward.context",
    "mib_faithfulness": "evaluation.faithfulness",
    "minimality": "evaluation.knockouts",
    "minimality_test": "evaluation.hypothesis_tests",
    "necessary_edges": "evaluation.ground_truth",
    "optimal_constants": "training.optimal_constants",
    "polish": "search.polish",
    "possible_edges": "evaluation.ground_truth",
    "precision_recall": "evaluation.roc",
    "roc": "evaluation.roc",
    "stability": "evaluation.stability",
}
__all__ = [
    "Attachment",
    "Circuit",
    "Comparison",
    "Completeness",
    "Constants",
    "EdgeGraph",
    "EdgePruner",
    "EdgeScores",
    "EquivalenceTest",
    "Evaluation",
    "ExactBudget",
    "Explanation",
    "FaithfulnessCurve",
    "IndependenceTest",
    "Lagrangian",
    "Minimality",
    "MinimalityTest",
    "Neurons",
    "Optimizer",
    "Penalty",
    "PruneResult",
    "Roc",
    "Stability",
    "Task",
    "compare",
    "completeness",
    "discover",
    "eliminate",
    "equivalence_test",
    "evaluate",
    "explain",
    "faithfulness_curve",
    "independence_test",
    "masked",
    "mib_faithfulness",
    "minimality",
    "minimality_test",
    "models",
    "necessary_edges",
    "optimal_constants",
    "polish",
    "possible_edges",
    "precision_recall",
    "roc",
    "stability",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
