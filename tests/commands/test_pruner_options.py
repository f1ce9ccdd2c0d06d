"""The options of `prune` are EdgePruner's settings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tl_edgeprune import ExactBudget
from tl_edgeprune.commands.common.pruner_options import FIELDS, PRUNER_OPTIONS
from tl_edgeprune.commands.jobs.pruner_settings import ELSEWHERE, NAMES
from tl_edgeprune.training.settings import PrunerSettings


def test_every_setting_has_its_option_with_the_same_help_and_default() -> None:
    settings = PrunerSettings(1)
    declared = {f.name: f for f in fields(PrunerSettings) if f.name not in ELSEWHERE}
    assert set(PRUNER_OPTIONS) == set(declared) == set(NAMES)
    for name, option in PRUNER_OPTIONS.items():
        assert option.help == declared[name].metadata["help"], name
        value = getattr(settings, name)
        if name == "controller":
            assert option.default == "exact-budget" and isinstance(value, ExactBudget)
        elif name not in ("n_edges", "recompute") and option.type is not FIELDS:
            assert option.default == _written(value), name


def _written(value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return None if value is None else str(value)
