"""Prompt pairs of the same shape, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_edgeprune.utils.renamed import warn_of_former_name

NO_TOKEN = -1


@dataclass(frozen=True)
class Batch:
    """Prompt pairs of the same length and number of read positions.

    `indices` are the pairs' indices in the task. `answers` and `distractors` have no columns if the
    task has none. `right` and `wrong` are sets of tokens, padded with NO_TOKEN (-1); None if no
    pair of the batch has any. `spans`: each position's index in the task's `span_names`; None if
    the task has none.
    """

    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    read_positions: Int[Tensor, "batch read"]
    answers: Int[Tensor, "batch answer"]
    distractors: Int[Tensor, "batch distractor"]
    indices: Int[Tensor, " batch"]
    right: Int[Tensor, "batch right"] | None = None
    wrong: Int[Tensor, "batch wrong"] | None = None
    spans: Int[Tensor, "batch pos"] | None = None

    @property
    def positions(self) -> Int[Tensor, "batch read"]:
        """The former name of `read_positions`."""
        warn_of_former_name("positions", "read_positions")
        return self.read_positions

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device, without waiting for the copy to a GPU."""
        non_blocking = torch.device(device).type != "cpu"
        tensors: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device, non_blocking=non_blocking)
            for name, tensor in vars(self).items()
        }
        return Batch(**tensors)

    def first(self, pairs: int) -> Batch:
        """The first pairs."""
        return self._at(slice(pairs))

    def select(self, rows: Sequence[int]) -> Batch:
        """The pairs at these rows."""
        return self if list(rows) == list(range(len(self))) else self._at(list(rows))

    def _at(self, rows: slice | list[int]) -> Batch:
        tensors: dict[str, Any] = {
            name: None if tensor is None else tensor[rows] for name, tensor in vars(self).items()
        }
        return Batch(**tensors)
