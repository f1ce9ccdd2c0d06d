"""Semi-synthetic models: transformers trained so that only a given circuit does a task.

causal.py: the task as variables that read one another, each at its place in a transformer.
network.py: a small transformer whose edges can be removed example by example.
training.py: strict interchange intervention training, and its accuracies.
examples.py: the causal models of the shipped weights.

For your own model: write a `CausalModel`, give it to `models.train_semi_synthetic`, and take its
pairs from `tasks.semi_synthetic.pairs`.
"""

from tl_edgeprune.siit.causal import CausalModel, Variable
from tl_edgeprune.siit.examples import EXAMPLES

__all__ = ["EXAMPLES", "CausalModel", "Variable"]
