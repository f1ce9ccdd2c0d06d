"""Another name of `tl_edgeprune.graph.edge_counts`."""

from tl_edgeprune.graph.edge_counts import edge_counts as edge_counts
from tl_edgeprune.graph.edge_counts import longest_run as longest_run
