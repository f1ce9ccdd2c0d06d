"""Ctrl-C in the middle of a run."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from tl_edgeprune.objectives import kl
from tl_edgeprune.training.trainer import Trainer


def stop_at_step(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Every training run is interrupted before this step."""
    step = Trainer._step

    def stopping(self: Any, number: int) -> None:
        if number == at:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(Trainer, "_step", stopping)


class StopAfter:
    """The KL, and Ctrl-C after so many steps of training (the warm start's calls are sums)."""

    def __init__(self, steps: int) -> None:
        self.left, self.accumulate, self.calls = steps, 1, 0
        self.__name__ = "kl"

    def __call__(self, logits: Tensor, full: Tensor, batch: Any) -> Tensor:
        if not torch.is_inference_mode_enabled() and _in_training():
            self.calls += 1
            if self.calls > self.left * self.accumulate:
                self.calls = 0
                raise KeyboardInterrupt
        return kl(logits, full, batch)


def _in_training() -> bool:
    return any(frame.function == "_step" for frame in inspect.stack())
