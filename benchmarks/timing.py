"""Median times of steps that are interleaved in one process, on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]


def seconds(step: Step) -> float:
    """CPU seconds of a step; a step that returns a float has measured itself.

    On one thread this is the wall-clock time without the share of other processes.
    """
    start = time.process_time()
    own = step()
    return own if isinstance(own, float) else time.process_time() - start


def medians(steps: Mapping[str, Step], repeats: int) -> dict[str, float]:
    """Median seconds of each step, over rounds that run every step once; the first warms up.

    A machine that slows down for a while slows all steps of a round alike.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            times[name].append(seconds(step))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def plain_step(model: Any, clean: Tensor) -> None:
    """The unit: a forward and a backward through frozen weights, down to the embeddings."""
    leaf: list[Tensor] = []

    def start(resid: Tensor, hook: Any) -> Tensor:
        leaf.append(resid.detach().requires_grad_())
        return leaf[0]

    logits = model.run_with_hooks(clean, fwd_hooks=[("blocks.0.hook_resid_pre", start)])
    logits[:, -1].logsumexp(-1).sum().backward()


def plain_forward(model: Any, clean: Tensor) -> None:
    with torch.no_grad():
        model(clean)
