"""The package's public names, which `tl_edgeprune` gives on first use."""

from tl_edgeprune import models, tasks
from tl_edgeprune.ablation.constants import Constants
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.neurons import Neurons
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.evaluation.compare import compare
from tl_edgeprune.evaluation.comparison import Comparison
from tl_edgeprune.evaluation.evaluate import Evaluation, evaluate
from tl_edgeprune.evaluation.explain.explain import explain
from tl_edgeprune.evaluation.explain.explanation import Explanation
from tl_edgeprune.evaluation.faithfulness import (
    FaithfulnessCurve,
    faithfulness_curve,
    mib_faithfulness,
)
from tl_edgeprune.evaluation.ground_truth import necessary_edges, possible_edges
from tl_edgeprune.evaluation.hypothesis_tests import (
    MinimalityTest,
    equivalence_test,
    independence_test,
    minimality_test,
)
from tl_edgeprune.evaluation.knockouts import Completeness, Minimality, completeness, minimality
from tl_edgeprune.evaluation.roc import Roc, precision_recall, roc
from tl_edgeprune.evaluation.stability import Stability, stability
from tl_edgeprune.evaluation.statistics import EquivalenceTest, IndependenceTest
from tl_edgeprune.forward.context import masked
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods.registry import discover
from tl_edgeprune.search.elimination import eliminate
from tl_edgeprune.search.polish import polish
from tl_edgeprune.tasks import Task
from tl_edgeprune.training.controllers import ExactBudget, Lagrangian, Penalty
from tl_edgeprune.training.optimal_constants import optimal_constants
from tl_edgeprune.training.pruner import EdgePruner, Optimizer
from tl_edgeprune.training.regularisers import Attachment
from tl_edgeprune.training.result import PruneResult

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
