"""Semi-synthetic models: transformers trained so that a given circuit, and no other, does a task.

causal.py: the task as variables that read one another, each at its place in a transformer.
network.py: a small transformer whose edges can be cut example by example.
training.py: strict interchange intervention training, and how well it went.
examples.py: the causal models of the shipped weights.

A model of your own: write a `CausalModel`, give it to `models.train_semi_synthetic`, and take its
pairs from `tasks.semi_synthetic.pairs`.
"""

from tl_edgeprune.siit.causal import CausalModel, Variable
from tl_edgeprune.siit.examples import EXAMPLES

__all__ = ["EXAMPLES", "CausalModel", "Variable"]
