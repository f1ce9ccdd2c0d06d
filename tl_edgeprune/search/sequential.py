"""A sequence of decisions about edges, several per run, with the same result as one per run.

1. Each decision depends on those before it: an edge is removed if the objective then rises by less
   than the threshold over its value after the last removal.
2. So candidates that run side by side depend on guesses: each removes its edge, and those before it
   that are guessed to be removed (if most recent edges were).
3. Candidates up to the first wrong guess are those of the sequence. The later ones are discarded,
   but their differences from one another make the next guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.graph.reachability import destinations_reaching_logits
from tl_edgeprune.search.full_cuts import FullCuts

RECENT = 16  # how many decisions the guess of the next ones depends on


def one_by_one(cuts: FullCuts, threshold: float, start: int, report: Callable[[int], None]) -> None:
    """Decide the edges before `start`, from the last to the first."""
    for read_index in reversed(range(len(cuts.graph.reads))):
        edges = [edge for edge in to_decide(cuts, read_index) if edge < start]
        decide(cuts, read_index, edges, threshold, report=report)


def to_decide(cuts: FullCuts, read_index: int) -> list[int]:
    """The read's kept edges from last to first, without those that lead nowhere, which are removed
    at once.
    """
    read, alive = cuts.graph.reads[read_index], cuts.alive()
    edges = (cuts.mask[read.edges].nonzero().flatten() + read.first_edge).flip(0).tolist()
    if cuts.heads_interact:
        return edges
    leads = destinations_reaching_logits(cuts.graph, read, alive).tolist()
    first, width = read.first_edge, read.n_sources
    dead = [edge for edge in edges if not leads[(edge - first) // width]]
    if dead:
        cuts.drop(torch.tensor(dead))
    return [edge for edge in edges if leads[(edge - first) // width]]


def decide(
    cuts: FullCuts,
    read_index: int,
    edges: Sequence[int],
    threshold: float,
    *,
    removal_likely: bool = True,
    report: Callable[[int], None] = lambda edge: None,
    rises: Float[Tensor, " edge"] | None = None,
) -> int:
    """Decide edges of one read in this order, each on top of the removals before it.

    Args:
        removal_likely: the first guess.
        report: called with the last decided edge, after each run.
        rises: a tensor that gets each edge's rise.

    Returns: how many edges were removed.
    """
    guesses: dict[int, bool] = {}
    recent: list[bool] = [removal_likely] * RECENT
    removed = n_decided = 0
    while n_decided < len(edges):
        chunk = edges[n_decided : n_decided + cuts.candidates(read_index)]
        likely = 2 * sum(recent) >= len(recent)
        guess = [guesses.get(edge, likely) for edge in chunk]
        values = cuts.values(read_index, _nested(cuts, read_index, chunk, guess))
        value, accepted, right = cuts.value, None, 0
        for number, expected in enumerate(guess):
            rise = values[number] - value
            goes = rise < threshold
            if rises is not None:
                rises[chunk[number]] = rise
            recent = [*recent[1:], goes]
            if goes:
                value, accepted = values[number], number
                removed += 1
            right += 1
            if goes != expected:
                break
        guesses |= _marginal(chunk, guess, values, right, threshold)
        if accepted is not None:
            cuts.commit(accepted)
        n_decided += right
        report(chunk[right - 1])
    return removed


def _nested(cuts: FullCuts, read_index: int, chunk: Sequence[int], guess: Sequence[bool]) -> Tensor:
    """Each edge's cut and the guessed cuts before it, [candidate, destination, source]."""
    read = cuts.graph.reads[read_index]
    nested = torch.zeros(len(chunk), read.n_destinations * read.n_sources, dtype=torch.bool)
    for number, (edge, goes) in enumerate(zip(chunk, guess, strict=True)):
        nested[number if not goes else slice(number, None), edge - read.first_edge] = True
    return nested.view(len(chunk), read.n_destinations, read.n_sources)


def _marginal(
    chunk: Sequence[int],
    guess: Sequence[bool],
    values: Sequence[float],
    right: int,
    threshold: float,
) -> dict[int, bool]:
    """Guesses for the edges after a wrong one, from their rise over the candidate they extend."""
    guesses, base = {}, values[right - 1]
    for edge, expected, value in zip(chunk[right:], guess[right:], values[right:], strict=True):
        guesses[edge] = value - base < threshold
        base = value if expected else base
    return guesses
