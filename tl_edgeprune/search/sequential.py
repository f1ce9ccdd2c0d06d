"""A sequence of decisions about edges, several to a run, with the result of one to a run.

1. Each decision rests on those before it: an edge goes if the objective then rises by less than the
   threshold over its value after the last removal.
2. So candidates that run side by side rest on guesses: each removes its edge and those before it
   that are guessed to go ("go" where most edges of late went).
3. Candidates up to the first wrong guess are those of the sequence. The later ones are thrown away,
   but their rise over one another makes the next guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.graph.reachability import leading
from tl_edgeprune.search.full_cuts import WholeCuts

RECENT = 16  # decisions that the guess of the next ones rests on


def one_by_one(
    cuts: WholeCuts, threshold: float, start: int, report: Callable[[int], None]
) -> None:
    """Decide the edges before `start`, from the last to the first."""
    for place in reversed(range(len(cuts.graph.reads))):
        edges = [edge for edge in to_decide(cuts, place) if edge < start]
        decide(cuts, place, edges, threshold, report=report)


def to_decide(cuts: WholeCuts, place: int) -> list[int]:
    """The read's kept edges from last to first. Those that lead nowhere are removed at once."""
    read, alive = cuts.graph.reads[place], cuts.alive()
    kept = (cuts.mask[read.edges].nonzero().flatten() + read.first_edge).flip(0).tolist()
    if cuts.heads_interact:
        return kept
    leads = leading(cuts.graph, read, alive).tolist()
    first, width = read.first_edge, read.n_sources
    dead = [edge for edge in kept if not leads[(edge - first) // width]]
    if dead:
        cuts.drop(torch.tensor(dead))
    return [edge for edge in kept if leads[(edge - first) // width]]


def decide(
    cuts: WholeCuts,
    place: int,
    edges: Sequence[int],
    threshold: float,
    *,
    removal_likely: bool = True,
    report: Callable[[int], None] = lambda edge: None,
    rises: Float[Tensor, " edge"] | None = None,
) -> int:
    """Decide edges of one read in this order, each on top of the removals before it. How many go.

    `rises` takes each edge's rise.

    A chunk's candidate is its edge on top of those before it that are guessed to go. Candidates are
    right up to the first wrong guess; what those after it tell makes the next guesses.
    """
    guesses: dict[int, bool] = {}
    recent: list[bool] = [removal_likely] * RECENT
    removed = done = 0
    while done < len(edges):
        chunk = edges[done : done + cuts.candidates(place)]
        likely = 2 * sum(recent) >= len(recent)
        guess = [guesses.get(edge, likely) for edge in chunk]
        values = cuts.values(place, _nested(cuts, place, chunk, guess))
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
        done += right
        report(chunk[right - 1])
    return removed


def _nested(cuts: WholeCuts, place: int, chunk: Sequence[int], guess: Sequence[bool]) -> Tensor:
    """Each edge's cut [candidate, destination, source], with the cuts before it that are
    guessed.
    """
    read = cuts.graph.reads[place]
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
    """Guesses for the edges after a wrong one, from their rise over the candidate they rest on."""
    guesses, below = {}, values[right - 1]
    for edge, expected, value in zip(chunk[right:], guess[right:], values[right:], strict=True):
        guesses[edge] = value - below < threshold
        below = value if expected else below
    return guesses
