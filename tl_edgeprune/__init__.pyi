"""The public names, as type checkers see them."""

from typing import Any

from tl_edgeprune import models as models
from tl_edgeprune import tasks as tasks
from tl_edgeprune.ablation.constants import Constants as Constants
from tl_edgeprune.circuits.circuit import Circuit as Circuit
from tl_edgeprune.circuits.neurons import Neurons as Neurons
from tl_edgeprune.circuits.scores import EdgeScores as EdgeScores
from tl_edgeprune.evaluation.compare import compare as compare
from tl_edgeprune.evaluation.comparison import Comparison as Comparison
from tl_edgeprune.evaluation.evaluate import Evaluation as Evaluation
from tl_edgeprune.evaluation.evaluate import evaluate as evaluate
from tl_edgeprune.evaluation.explain.explain import explain as explain
from tl_edgeprune.evaluation.explain.explanation import Explanation as Explanation
from tl_edgeprune.evaluation.faithfulness import FaithfulnessCurve as FaithfulnessCurve
from tl_edgeprune.evaluation.faithfulness import faithfulness_curve as faithfulness_curve
from tl_edgeprune.evaluation.faithfulness import mib_faithfulness as mib_faithfulness
from tl_edgeprune.evaluation.ground_truth import necessary_edges as necessary_edges
from tl_edgeprune.evaluation.ground_truth import possible_edges as possible_edges
from tl_edgeprune.evaluation.hypothesis_tests import MinimalityTest as MinimalityTest
from tl_edgeprune.evaluation.hypothesis_tests import equivalence_test as equivalence_test
from tl_edgeprune.evaluation.hypothesis_tests import independence_test as independence_test
from tl_edgeprune.evaluation.hypothesis_tests import minimality_test as minimality_test
from tl_edgeprune.evaluation.knockouts import Completeness as Completeness
from tl_edgeprune.evaluation.knockouts import Minimality as Minimality
from tl_edgeprune.evaluation.knockouts import completeness as completeness
from tl_edgeprune.evaluation.knockouts import minimality as minimality
from tl_edgeprune.evaluation.roc import Roc as Roc
from tl_edgeprune.evaluation.roc import precision_recall as precision_recall
from tl_edgeprune.evaluation.roc import roc as roc
from tl_edgeprune.evaluation.stability import Stability as Stability
from tl_edgeprune.evaluation.stability import stability as stability
from tl_edgeprune.evaluation.statistics import EquivalenceTest as EquivalenceTest
from tl_edgeprune.evaluation.statistics import IndependenceTest as IndependenceTest
from tl_edgeprune.forward.context import masked as masked
from tl_edgeprune.graph.edge_graph import EdgeGraph as EdgeGraph
from tl_edgeprune.methods.registry import discover as discover
from tl_edgeprune.search.elimination import eliminate as eliminate
from tl_edgeprune.search.polish import polish as polish
from tl_edgeprune.tasks.task import Task as Task
from tl_edgeprune.training.controllers import ExactBudget as ExactBudget
from tl_edgeprune.training.controllers import Lagrangian as Lagrangian
from tl_edgeprune.training.controllers import Penalty as Penalty
from tl_edgeprune.training.optimal_constants import optimal_constants as optimal_constants
from tl_edgeprune.training.pruner import EdgePruner as EdgePruner
from tl_edgeprune.training.pruner import Optimizer as Optimizer
from tl_edgeprune.training.regularisers import Attachment as Attachment
from tl_edgeprune.training.result import PruneResult as PruneResult
from tl_edgeprune.utils.versions import __version__ as __version__

__all__: list[str]

def __getattr__(name: str) -> Any: ...
