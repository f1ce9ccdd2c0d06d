"""Edge Pruning as hooks: find circuits in the transformer that you already have.

Bhaskar, Wettig, Friedman and Chen, "Finding Transformer Circuits with Edge Pruning", NeurIPS 2024.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tl_edgeprune.utils.versions import __version__ as __version__

if TYPE_CHECKING:
    from tl_edgeprune.surface import *

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


class _Package(ModuleType):
    """This package. Its names are imported on first use, since PyTorch and TransformerLens take
    seconds: `tl-edgeprune --help` does without them.
    """

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            return getattr(import_module(f"{__name__}.surface"), name)
        if not name.startswith("_"):
            try:
                return import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing tl_edgeprune.evaluate would put the module where the function is.
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
