"""Ctrl-C in the middle of a run."""

from __future__ import annotations

from typing import Any

import pytest

from tl_edgeprune.training.trainer import Training


def stop_at_step(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Every training run is interrupted before this step."""
    step = Training._step

    def stopping(self: Any, number: int) -> None:
        if number == at:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(Training, "_step", stopping)
