"""The graph of a transformer's residual stream, without any model: names, order, counts.

Reading order: `edge_graph` (sources, destinations, edges), `names` (`a0.h3->a5.h2<q>@S2`),
`edge_indices`, `edge_counts`, `spans`, `reachability` (which edges lead to the logits).
"""

from tl_edgeprune.graph.edge_counts import edge_counts, longest_run
from tl_edgeprune.graph.edge_graph import EdgeGraph

__all__ = ["EdgeGraph", "edge_counts", "longest_run"]
