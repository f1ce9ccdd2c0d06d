"""Averages over prompts, position by position, with the tokens that stand there.

Prompts of one length and one set of read positions are one *layout*: their positions correspond. A
position whose token is the same in all of them is named by it; where tokens vary, by the first
prompt's, in round brackets. Names that come twice have their position behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_edgeprune.tasks.batch import Batch


@dataclass
class Layout:
    """What is known of the prompts of one layout, summed up: rows of numbers over positions."""

    tokens: Int[Tensor, " pos"]
    same: Bool[Tensor, " pos"]  # whether all prompts have this token there
    read: Int[Tensor, " read"]
    sums: dict[str, Float[Tensor, "*row pos"]]
    n_pairs: int = 0

    @property
    def means(self) -> dict[str, Float[Tensor, "*row pos"]]:
        """By name, the means over the prompts."""
        return {name: total / self.n_pairs for name, total in self.sums.items()}

    def labels(self, text_of: Callable[[int], str]) -> list[str]:
        """A name for each position; where two would have the same, with the position."""
        texts = [text_of(token) for token in self.tokens.tolist()]
        names = [text if same else f"({text})" for text, same in zip(texts, self.same, strict=True)]
        return [f"{n}[{at}]" if names.count(n) > 1 else n for at, n in enumerate(names)]


class PositionMeans:
    """Layouts, filled batch by batch."""

    def __init__(self) -> None:
        self.layouts: dict[tuple[int, ...], Layout] = {}

    def add(self, batch: Batch, values: dict[str, Float[Tensor, "batch *row pos"]]) -> None:
        """Add numbers for each prompt of a batch and each position."""
        clean, read = batch.clean.cpu(), batch.read_positions.cpu()
        values = {name: value.double().cpu() for name, value in values.items()}
        for positions in read.unique(dim=0):
            in_layout = (read == positions).all(1)
            sums = {name: value[in_layout].sum(0) for name, value in values.items()}
            self._add(clean[in_layout], positions, sums)

    def _add(self, clean: Int[Tensor, "prompt pos"], read: Tensor, sums: dict[str, Tensor]) -> None:
        key = (clean.shape[1], *read.tolist())
        layout = self.layouts.get(key)
        if layout is None:
            constant = torch.ones(clean.shape[1], dtype=torch.bool)
            layout = self.layouts[key] = Layout(clean[0], constant, read, sums={})
        layout.same &= (clean == layout.tokens).all(0)
        layout.n_pairs += len(clean)
        layout.sums = {name: layout.sums.get(name, 0) + total for name, total in sums.items()}

    @property
    def commonest(self) -> Layout:
        """The layout of most prompts."""
        return max(self.layouts.values(), key=lambda layout: layout.n_pairs)
