"""Kept edges tried by themselves: all of them; then, pass after pass, those whose cut raised the
objective by less than `CLEAR` thresholds; and all again, until such a pass removes none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.search.full_cuts import WholeCuts
from tl_edgeprune.search.sequential import decide, to_decide

CLEAR = 3.0


@dataclass
class Singles:
    """Where that is: how many reads the pass has yet to visit, how many edges it has removed,
    whether it is `narrow` (not of all edges), and each edge's rise when it was tried last.
    """

    rises: Float[Tensor, " edge"] = field(compare=False)
    reads_left: int
    removed: int = 0
    narrow: bool = False

    @classmethod
    def first(cls, cuts: WholeCuts) -> Singles:
        """Before the first pass."""
        rises = torch.zeros(cuts.graph.n_edges, dtype=torch.float64)
        return cls(rises, len(cuts.graph.reads))


def try_each(
    cuts: WholeCuts,
    threshold: float,
    guess: Float[Tensor, " edge"],
    state: Singles,
    report: Callable[[], None],
) -> None:
    """Try kept edges by themselves, from `state` on, which is kept up to date; `report` is called
    after each read. Within a read, the least harmful by `guess` come first.
    """
    while True:
        _finish_pass(cuts, threshold, guess, state, report)
        if not state.removed and not state.narrow:
            return
        state.narrow, state.removed = state.removed > 0, 0
        state.reads_left = len(cuts.graph.reads)


def _finish_pass(
    cuts: WholeCuts,
    threshold: float,
    guess: Float[Tensor, " edge"],
    state: Singles,
    report: Callable[[], None],
) -> None:
    while state.reads_left:
        place = state.reads_left - 1
        edges = sorted(to_decide(cuts, place), key=lambda edge: float(guess[edge]))
        if state.narrow:
            edges = [edge for edge in edges if state.rises[edge] < CLEAR * threshold]
        state.removed += decide(
            cuts, place, edges, threshold, removal_likely=False, rises=state.rises
        )
        state.reads_left = place
        report()
