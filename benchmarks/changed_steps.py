"""Variants of EdgePruner's training step for settings.py that no setting provides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from tl_edgeprune.runs.targets import Lesson
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.training import gates as masks
from tl_edgeprune.training.trainer import Training

PlainStep = Callable[[Training, int], None]
Step = Callable[[PlainStep, Training, int], None]


@contextmanager
def stepping(step: Step) -> Iterator[None]:
    """All runs in this block use this step."""
    plain = Training._step
    with patch.object(Training, "_step", lambda training, number: step(plain, training, number)):
        yield


def two_masks(plain: PlainStep, training: Training, number: int) -> None:
    """Draws two masks per step, on the same pairs, targets and reference."""
    feed = training.feed
    batch: Batch = next(feed)
    lesson: Lesson = training.teacher.lesson(batch)
    training.feed = _Again(batch, feed.place)  # type: ignore[assignment]
    with (
        patch.object(training.pruner, "accumulate", 2),
        patch.object(training.teacher, "lesson", lambda _: lesson),
    ):
        plain(training, number)
    training.feed = feed


class _Again:
    """A batch stream that always returns the same batch."""

    def __init__(self, batch: Batch, place: object) -> None:
        self.batch, self.place = batch, place

    def __next__(self) -> Batch:
        return self.batch


def late_16(plain: PlainStep, training: Training, number: int) -> None:
    """Twice as many pairs per step in the last two fifths."""
    late = number >= 0.6 * training.pruner.steps
    with patch.object(training.pruner, "accumulate", 2 if late else 1):
        plain(training, number)


def cooling(plain: PlainStep, training: Training, number: int) -> None:
    """The gates' temperature falls from 1 to 1/3 instead of staying at 2/3."""
    beta = 3 ** (-number / training.pruner.steps)
    offset = beta * math.log(-masks.GAMMA / masks.ZETA)
    with patch.object(masks, "BETA", beta), patch.object(masks, "OPEN_OFFSET", offset):
        plain(training, number)
