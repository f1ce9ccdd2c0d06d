"""EdgePruner's settings of the right kind, looked at before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch

from tl_edgeprune.masks import Controller
from tl_edgeprune.regularisers import Attachment
from tl_edgeprune.scores import EdgeScores

WHOLE = ("steps", "batch_size", "accumulate", "checkpoint_every", "seed", "candidates")
WHOLE_OR_NONE = ("n_edges", "n_neurons")
NUMBERS = ("lr", "hard_share", "average_share")
CONTROLLERS = ("controller", "node_controller", "neuron_controller")
STARTS = (str, EdgeScores, torch.Tensor)


def check_kinds(settings: Mapping[str, Any]) -> None:
    """Raise TypeError for a setting of another kind, ValueError for an infinite number."""
    for name in (*WHOLE, *WHOLE_OR_NONE):
        value, free = settings[name], name in WHOLE_OR_NONE
        if not (_is_whole(value) or (free and value is None)):
            _refuse(name, value, f"a whole number{', or None' if free else ''}")
    for name in NUMBERS:
        value = settings[name]
        if not isinstance(value, Real) or isinstance(value, bool):
            _refuse(name, value, "a number")
        if math.isinf(value):
            raise ValueError(f"{name}={value}: expected a finite number.")
    for name in CONTROLLERS:
        if not isinstance(settings[name], Controller | None) or isinstance(settings[name], type):
            _refuse(name, settings[name], "ExactBudget(…), Lagrangian(…) or Penalty(…)")
    if not hasattr(settings["optimizer"], "betas"):
        _refuse("optimizer", settings["optimizer"], "an Optimizer(…) of tl_edgeprune")
    if not isinstance(settings["attachment"], Attachment | None):
        _refuse("attachment", settings["attachment"], "Attachment(weight), or None")
    if not isinstance(settings["dtype"], torch.dtype | None):
        _refuse("dtype", settings["dtype"], "a dtype such as torch.bfloat16, or None")
    if not isinstance(settings["init_scores"], (*STARTS, type(None))):
        _refuse("init_scores", settings["init_scores"], "'mask-ig', EdgeScores, a tensor or None")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _refuse(name: str, value: Any, expected: str) -> None:
    raise TypeError(f"{name}={value!r:.100}: expected {expected}.")
