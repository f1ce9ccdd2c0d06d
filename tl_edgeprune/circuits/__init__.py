"""Results and their files: circuits, edge scores, neurons.

Reading order: `metadata` (where a result comes from), `circuit`, `scores`, `neurons`; then other
projects' formats: `mib` with its `mib_table`, `networkx_graph`.
"""

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.neurons import Neurons
from tl_edgeprune.circuits.scores import EdgeScores

__all__ = ["Circuit", "EdgeScores", "Neurons"]
