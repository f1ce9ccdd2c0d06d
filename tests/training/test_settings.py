"""EdgePruner's settings of the wrong kind are told by name, before any run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tl_edgeprune import EdgePruner, Lagrangian
from tl_edgeprune.training.settings import check_values

WRONG: list[tuple[str, Any, str]] = [
    ("steps", 2.5, "steps=2.5: expected a whole number."),
    ("steps", "10", "steps='10': expected a whole number."),
    ("seed", None, "seed=None: expected a whole number."),
    ("n_edges", True, "n_edges=True: expected a whole number, or None."),
    ("lr", "0.1", "lr='0.1': expected a number."),
    ("attachment", 0.1, "attachment=0.1: expected Attachment(weight), or None."),
    ("optimizer", torch.optim.Adam, "expected an Optimizer(…) of tl_edgeprune."),
    ("controller", "lagrangian", "controller='lagrangian': expected ExactBudget(…)"),
    ("node_controller", Lagrangian, "expected ExactBudget(…), Lagrangian(…) or Penalty(…)."),
    ("init_scores", {1: 2}, "init_scores={1: 2}: expected 'mask-ig', EdgeScores, a tensor or None"),
    ("dtype", "bfloat16", "dtype='bfloat16': expected a dtype such as torch.bfloat16, or None."),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_setting_of_another_kind_is_told(name: str, value: Any, message: str) -> None:
    settings = vars(EdgePruner(10))
    check_values(settings)
    with pytest.raises(TypeError) as error:
        check_values(settings | {name: value})
    assert message in str(error.value)


def test_an_infinite_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="lr=inf: expected a finite number"):
        EdgePruner(10, lr=float("inf"))
