"""The points at which a mask's gradient is taken, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.forward.forward_pass import HeldSources
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.runs.targets import TargetBatch


def full_mask_path(run: MaskedModel, target_batch: TargetBatch) -> Iterator[Point]:
    """The full model, once."""
    yield Point(torch.ones(run.graph.n_edges))


def input_path(shares: Sequence[float]) -> Path:
    """The full model, its input held at these shares of the way to the clean one."""

    def path(run: MaskedModel, target_batch: TargetBatch) -> Iterator[Point]:
        contract = run.differences(target_batch.batch.clean, target_batch.reference)
        inputs = range(run.graph.n_inputs)
        for share in shares:
            yield Point(torch.ones(run.graph.n_edges), HeldSources(inputs, share), contract)

    return path


class Point(NamedTuple):
    """Where a gradient is taken."""

    mask: Float[Tensor, " edge"]
    held: HeldSources | None = None
    contract: Float[Tensor, "source row d_model"] | None = None


Path = Callable[[MaskedModel, TargetBatch], Iterator[Point]]


def path_at(mask: Bool[Tensor, " edge"]) -> Path:
    """The path of one point: a circuit as it is."""

    def path(run: MaskedModel, target_batch: TargetBatch) -> Iterator[Point]:
        yield Point(mask.float())

    return path


def check_steps(steps: int) -> None:
    """Raise ValueError for a path without points."""
    if steps < 1:
        raise ValueError(f"steps={steps}: a path needs at least one point.")


def mask_path(steps: int) -> Path:
    """Masks with every edge at the same z, at the midpoints of `steps` parts of [0, 1]."""
    check_steps(steps)

    def path(run: MaskedModel, target_batch: TargetBatch) -> Iterator[Point]:
        for step in range(steps):
            yield Point(torch.full((run.graph.n_edges,), (step + 0.5) / steps))

    return path
