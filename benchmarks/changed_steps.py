"""Variants of EdgePruner's training step for settings.py that no setting provides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from tl_edgeprune.runs.targets import TargetBatch
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.training import gates as masks
from tl_edgeprune.training.trainer import Trainer

PlainStep = Callable[[Trainer, int], None]
Step = Callable[[PlainStep, Trainer, int], None]


@contextmanager
def stepping(step: Step) -> Iterator[None]:
    """All runs in this block use this step."""
    plain = Trainer._step
    with patch.object(Trainer, "_step", lambda training, number: step(plain, training, number)):
        yield


def two_masks(plain: PlainStep, training: Trainer, number: int) -> None:
    """Draws two masks per step, on the same pairs, targets and reference."""
    stream = training.stream
    batch: Batch = next(stream)
    target_batch: TargetBatch = training.targets.prepare(batch)
    training.stream = _Again(batch)  # type: ignore[assignment]
    with (
        patch.object(training.pruner, "accumulate", 2),
        patch.object(training.targets, "prepare", lambda _: target_batch),
    ):
        plain(training, number)
    training.stream = stream


class _Again:
    """A batch stream that always returns the same batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __next__(self) -> Batch:
        return self.batch


def late_16(plain: PlainStep, training: Trainer, number: int) -> None:
    """Twice as many pairs per step in the last two fifths."""
    late = number >= 0.6 * training.pruner.steps
    with patch.object(training.pruner, "accumulate", 2 if late else 1):
        plain(training, number)


def cooling(plain: PlainStep, training: Trainer, number: int) -> None:
    """The gates' temperature falls from 1 to 1/3 instead of staying at 2/3."""
    beta = 3 ** (-number / training.pruner.steps)
    offset = beta * math.log(-masks.GAMMA / masks.ZETA)
    with patch.object(masks, "BETA", beta), patch.object(masks, "OPEN_OFFSET", offset):
        plain(training, number)
