"""The objective's rise when one edge is cut, for each edge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.search.full_cuts import WholeCuts


def each_rise(
    cuts: WholeCuts, edges: Iterable[int]
) -> Iterator[tuple[list[int], Float[Tensor, " edge"]]]:
    """How much the mean objective of the current mask rises when each edge alone is cut, some edges
    at a time, in the order of the graph.
    """
    wanted = sorted(edges)
    for place in range(len(cuts.graph.reads)):
        for some in _chunks(cuts, place, wanted):
            yield some, _rises(cuts, place, some)


def _chunks(cuts: WholeCuts, place: int, wanted: Iterable[int]) -> list[list[int]]:
    """The wanted edges of a read, as many at a time as run side by side."""
    read = cuts.graph.reads[place].edges
    mine = [edge for edge in wanted if read.start <= edge < read.stop]
    size = cuts.candidates(place)
    return [mine[first : first + size] for first in range(0, len(mine), size)]


def _rises(cuts: WholeCuts, place: int, edges: list[int]) -> Float[Tensor, " edge"]:
    read = cuts.graph.reads[place]
    cut = torch.zeros(len(edges), read.n_destinations * read.n_sources, dtype=torch.bool)
    cut[torch.arange(len(edges)), torch.tensor(edges) - read.first_edge] = True
    losses = cuts.losses(place, cut.view(len(edges), read.n_destinations, read.n_sources))
    return (losses - cuts.per_pair).mean(1)
