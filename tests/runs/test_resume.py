"""Searches that were stopped go on from their checkpoints, to the same bits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support import model_zoo

from tl_edgeprune import EdgeGraph, EdgePruner, discover
from tl_edgeprune.ablation.kinds import check_ablation
from tl_edgeprune.methods.registry import METHODS
from tl_edgeprune.runs import resume as saved_module
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.search.partial_cuts import PartialCuts

SUMS = sorted(
    name
    for name, method in METHODS.items()
    if name not in ("exact", "random") and not (method.gives_circuit or method.trained)
)
QUICK = ("eap", "hisp", "ifr", "exact")
EACH = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in (*SUMS, "exact")]


@contextmanager
def stopped_after(most: int | None) -> Iterator[list[int]]:
    """Batches (exact: groups of cuts) that are looked at; the run is interrupted after so many."""
    seen: list[int] = []

    def counted(of: Any) -> Any:
        def look(self: Any, *arguments: Any) -> Any:
            if len(seen) == most:
                raise KeyboardInterrupt
            seen.append(len(seen))
            return of(self, *arguments)

        return look

    with (
        patch.object(Targets, "prepare", counted(Targets.prepare)),
        patch.object(PartialCuts, "losses", counted(PartialCuts.losses)),
    ):
        yield seen


@pytest.mark.parametrize("method", EACH)
def test_a_stopped_search_goes_on_to_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = model_zoo.load("bridge-gpt2"), tmp_path / "new" / "state.safetensors"
    monkeypatch.setattr(saved_module, "SAVE_SECONDS", 0.0)
    task = model_zoo.pairs(model, 5)
    settings: dict[str, Any] = {} if method == "hisp" else {"batch_size": 2}
    if method == "exact":
        settings["edges"] = EdgeGraph.from_model(model).edges[100:160]
        discover(model, task, method, **settings)  # partial runs are checked once per model
    with stopped_after(None) as whole:
        expected = discover(model, task, method, **settings)
    with stopped_after(len(whole) - 1), pytest.raises(KeyboardInterrupt):
        discover(model, task, method, checkpoint=path, **settings)
    before = path.read_bytes()
    with stopped_after(None) as rest:
        found = discover(model, task, method, checkpoint=path, **settings)
    assert torch.equal(found.tensor, expected.tensor)
    known = {name: value for name, value in expected.metadata.items() if name != "runs"}
    assert known.items() <= found.metadata.items()  # the full model's run is made again
    assert len(rest) < len(whole) and path.read_bytes() != before


def test_every_search_but_the_instant_one_can_go_on() -> None:
    assert {name for name, made in METHODS.items() if "checkpoint" not in made.parameters} == {
        "random"
    }


def test_another_searchs_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = model_zoo.load("bridge-gpt2"), tmp_path / "state.safetensors"
    monkeypatch.setattr(saved_module, "SAVE_SECONDS", 0.0)
    discover(model, model_zoo.pairs(model, 4), "eap-ig", checkpoint=path)
    other = model_zoo.build("bridge-gpt2")
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.01)
    with pytest.raises(ValueError, match="is of another run .weights differ."):
        discover(other, model_zoo.pairs(model, 4), "eap-ig", checkpoint=path)
    with pytest.raises(ValueError, match="is of another run .settings.batch_size differ."):
        discover(model, model_zoo.pairs(model, 4), "eap-ig", checkpoint=path, batch_size=1)
    for method, pairs, settings in [
        ("eap-ig", 4, {"steps": 3}),
        ("eap-ig", 4, {"ablation": "zero"}),
        ("eap-ig", 4, {"batch_size": 1}),
        ("eap-ig", 3, {}),
        ("mask-ig", 4, {}),
        ("exact", 4, {}),
    ]:
        with pytest.raises(ValueError, match="is of another run"):
            discover(model, model_zoo.pairs(model, pairs), method, checkpoint=path, **settings)


def test_a_state_of_another_kind_is_told_apart(tmp_path: Path, monkeypatch: Any) -> None:
    model, ours, theirs = model_zoo.load("bridge-gpt2"), tmp_path / "search", tmp_path / "run"
    monkeypatch.setattr(saved_module, "SAVE_SECONDS", 0.0)
    task, settings = model_zoo.pairs(model, 4), {"steps": 1, "init_scores": None, "progress": False}
    discover(model, task, "eap", checkpoint=ours)
    EdgePruner(9, checkpoint=theirs, **settings).fit(model, task)
    with pytest.raises(ValueError, match="is of a run of EdgePruner: give another path"):
        discover(model, task, "eap", checkpoint=theirs)
    with pytest.raises(ValueError, match="is of a search, not of EdgePruner"):
        EdgePruner(9, **settings).fit(model, task, resume=ours)
    with pytest.raises(ValueError, match="is a folder: give a file in it"):
        EdgePruner(9, checkpoint=tmp_path)


@pytest.mark.parametrize("ablation", [None, 0, True])
def test_an_ablation_that_is_no_name_is_refused(ablation: Any) -> None:
    without_hook = inspect.unwrap(check_ablation)  # which refuses it first, in tests
    with pytest.raises(TypeError, match="expected one of counterfactual, zero"):
        without_hook(ablation)
