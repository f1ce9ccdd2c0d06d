"""A training history as curves: objective, running mean, edges and budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Curves:
    """One value per step, NaN if there is none. smooth: the running mean of the objective."""

    steps: list[float]
    loss: list[float]
    smooth: list[float]
    edges: list[float]
    target: list[float]

    @property
    def jumps(self) -> bool:
        """Whether the budget is drawn again at each step, so that a line through it is noise."""
        travelled = sum(abs(b - a) for a, b in pairwise(self.edges))
        return travelled > 5 * (max(self.edges) - min(self.edges))


def curves_of(history: Sequence[Mapping[str, Any]]) -> Curves:
    """The curves of a result's `history`.

    Raises ValueError if it is empty, or a step lacks a value.
    """
    if not history:
        raise ValueError("the history is empty: expected at least one step, as in result.history.")
    for index, step in enumerate(history):
        missing = [key for key in ("step", "loss", "edges") if step.get(key) is None]
        if missing:
            raise ValueError(
                f"history[{index}] has {sorted(step)}, but no {' or '.join(missing)}: pass the "
                "result.history of EdgePruner.fit."
            )
    steps, loss, edges, target = (
        [float(math.nan if (value := step.get(key)) is None else value) for step in history]
        for key in ("step", "loss", "edges", "target")
    )
    return Curves(steps, loss, smooth(loss, len(loss) // 20), edges, target)


def thin_out(curves: Curves, most: int) -> dict[str, Any]:
    """The curves as JSON: about `most` steps at most, including the last; None for NaN."""
    n = len(curves.steps)
    stride = max(1, math.ceil(n / most))
    steps = sorted({*range(0, n, stride), n - 1})
    return {"jumps": curves.jumps} | {
        name: [float(f"{values[i]:.6g}") if math.isfinite(values[i]) else None for i in steps]
        for name, values in vars(curves).items()
    }


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential running mean over about `span` values, unbiased at the start; skips NaN."""
    decay = 1 - 2 / (max(span, 1) + 1)
    total = weight = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight if weight else math.nan)
    return means
