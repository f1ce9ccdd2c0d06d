"""Kept edges tried one by one, pass after pass, until a pass over all of them removes none.

The passes between are narrow: they try the edges whose cut raised the objective by less than
`CLEAR` thresholds when it was last tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.search.full_cuts import FullCuts
from tl_edgeprune.search.sequential import decide, to_decide

CLEAR = 3.0


@dataclass
class SingleEdges:
    """How far the passes are.

    Attributes:
        rises: each edge's rise when it was tried last.
        reads_left: how many reads this pass has yet to visit.
        removed: how many edges it has removed.
        narrow: whether it tries only some edges.
    """

    rises: Float[Tensor, " edge"] = field(compare=False)
    reads_left: int
    removed: int = 0
    narrow: bool = False

    @classmethod
    def first(cls, cuts: FullCuts) -> SingleEdges:
        """Before the first pass."""
        rises = torch.zeros(cuts.graph.n_edges, dtype=torch.float64)
        return cls(rises, len(cuts.graph.reads))


def try_each(
    cuts: FullCuts,
    threshold: float,
    guess: Float[Tensor, " edge"],
    state: SingleEdges,
    report: Callable[[], None],
) -> None:
    """Try kept edges one by one, from `state` on, which is updated.

    `report` is called after each read. Within a read, the edges with the lowest `guess` come first.
    """
    while True:
        _finish_pass(cuts, threshold, guess, state, report)
        if not state.removed and not state.narrow:
            return
        state.narrow, state.removed = state.removed > 0, 0
        state.reads_left = len(cuts.graph.reads)


def _finish_pass(
    cuts: FullCuts,
    threshold: float,
    guess: Float[Tensor, " edge"],
    state: SingleEdges,
    report: Callable[[], None],
) -> None:
    while state.reads_left:
        read_index = state.reads_left - 1
        edges = sorted(to_decide(cuts, read_index), key=lambda edge: float(guess[edge]))
        if state.narrow:
            edges = [edge for edge in edges if state.rises[edge] < CLEAR * threshold]
        state.removed += decide(
            cuts, read_index, edges, threshold, removal_likely=False, rises=state.rises
        )
        state.reads_left = read_index
        report()
