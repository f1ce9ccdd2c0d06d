"""How much the objective rises if one edge is cut, for each edge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.search.full_cuts import FullCuts


def each_effect(
    cuts: FullCuts, edges: Iterable[int]
) -> Iterator[tuple[Int[Tensor, " edge"], Float[Tensor, " edge"]]]:
    """Edges that run side by side, and how much the mean objective of the current mask rises if
    each is cut by itself (float64, CPU). Edges come in the order of the graph.
    """
    ordered = torch.tensor(sorted(edges), dtype=torch.long)
    for index, read in enumerate(cuts.graph.reads):
        of_read = ordered[(ordered >= read.edges.start) & (ordered < read.edges.stop)]
        for chunk in of_read.split(cuts.candidates(index)) if len(of_read) else ():
            cut = torch.zeros(len(chunk), read.n_destinations, read.n_sources, dtype=torch.bool)
            cut.flatten(1)[torch.arange(len(chunk)), chunk - read.first_edge] = True
            yield chunk, (cuts.losses(index, cut) - cuts.per_pair).mean(1)


def edge_effects(cuts: FullCuts, edges: Int[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """`each_effect` of all these edges (in the order of the graph) at once."""
    return torch.cat([effects for _, effects in each_effect(cuts, edges.tolist())])
