"""Where gradients are needed they are there, whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import model_zoo
from torch import Tensor

from tl_edgeprune import EdgePruner, Task, discover, optimal_constants

MODEL = "bridge-llama-gqa"
QUICK: dict[str, Any] = {"steps": 2, "batch_size": 4, "progress": False}


def pruned(model: Any, task: Task) -> Tensor:
    return EdgePruner(5, **QUICK).fit(model, task).log_alpha


def learned(model: Any, task: Task) -> Tensor:
    return optimal_constants(model, task, **QUICK).z


def of_method(method: str) -> Callable[[Any, Task], Tensor]:
    settings = {} if method == "eap" else QUICK
    return lambda model, task: discover(model, task, method=method, **settings).tensor


CALLS = {"EdgePruner": pruned, "optimal_constants": learned} | {
    method: of_method(method) for method in ("edge-pruning", "ugs", "subnetwork-probing", "eap")
}
each_call = pytest.mark.parametrize("call", CALLS)


@each_call
def test_gradients_that_are_switched_off_are_switched_on_meanwhile(call: str) -> None:
    model, task = model_zoo.load(MODEL), model_zoo.pairs(model_zoo.load(MODEL), 4)
    expected = CALLS[call](model, task)
    with torch.no_grad():
        actual = CALLS[call](model, task)
        assert not torch.is_grad_enabled()
    assert torch.equal(actual, expected)


@each_call
def test_inference_mode_is_refused(call: str) -> None:
    model, task = model_zoo.load(MODEL), model_zoo.pairs(model_zoo.load(MODEL), 4)
    message = r"needs gradients, and torch\.inference_mode gives none: call it outside"
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        CALLS[call](model, task)
