"""`tl-edgeprune compare`: its figures are `compare`'s, and its folder goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from support.command_line import mistake, told

import tl_edgeprune
from tl_edgeprune.methods import registry

ASKED = """--methods eap,acdc --sizes 5,12 --set acdc.threshold=[0.01,0.1] --set eap.batch_size=4
--pairs 8 --device cpu --no-progress""".split()


@pytest.fixture(scope="module")
def out(llama: str, gifts: str, tmp_path_factory: Any) -> Path:
    """A finished comparison."""
    folder = tmp_path_factory.mktemp("runs") / "compared"
    result = told("compare", llama, gifts, *ASKED, "--out", folder, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert len(printed["rows"]) == 4
    assert all((folder / name).is_file() for name in printed["files"])
    return folder


def test_figures_are_those_of_compare(out: Path, llama: str, gifts: str) -> None:
    loaded: Any = tl_edgeprune.models.load(llama, device="cpu")
    held_out, train = tl_edgeprune.tasks.from_jsonl(gifts, loaded)[:8].split(0.5, 0)
    settings: Any = {"acdc": {"threshold": [0.01, 0.1]}, "eap": {"batch_size": 4}}
    expected = tl_edgeprune.compare(
        loaded, train, held_out, ["eap", "acdc"], [5, 12], settings=settings, progress=False
    ).table
    table = pandas.read_csv(out / "table.csv")
    for name in ("method", "n_edges", "n_alive"):
        assert list(table[name]) == list(expected[name])
    assert list(table["kl"]) == pytest.approx(list(expected["kl"]), abs=1e-6)
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_goes_on_and_takes_further_methods(
    out: Path, llama: str, gifts: str, monkeypatch: Any
) -> None:
    before = (out / "settings.json").read_bytes()
    wrong = ["compare", llama, gifts, *ASKED, "--out", out]
    assert "holds a comparison with sizes [5, 12]" in mistake(*wrong, "--sizes", "5")
    assert "method 'hisp': unknown objective" in mistake(
        *wrong, "--methods", "hisp", "--set", "hisp.objective=nope"
    )
    assert (out / "settings.json").read_bytes() == before
    assert f"resume {out}" in mistake("prune", llama, gifts, "--n-edges", 9, "--out", out)
    made: list[str] = []
    discover = registry.discover

    def noted(model: Any, task: Any, method: str, **settings: Any) -> Any:
        if type(task) is tl_edgeprune.Task:  # no rehearsal
            made.append(method)
        return discover(model, task, method, **settings)

    monkeypatch.setattr(registry, "discover", noted)
    rows = json.loads(told("resume", out, "--json").stdout)["rows"]
    assert (made, len(rows)) == ([], 4)
    more = json.loads(told(*wrong, "--methods", "random", "--json").stdout)["rows"]
    assert made == ["random"] and len(more) == 6

    def stopped(*args: Any, **settings: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tl_edgeprune.commands.jobs.compare, "compare", stopped)
    result = told("resume", out)
    assert result.exit_code == 130 and f"Go on with tl-edgeprune resume {out}" in result.stderr


def test_wrong_comparisons(llama: str, gifts: str, tmp_path: Path) -> None:
    asked = ["compare", llama, gifts, "--out", tmp_path / "new"]
    assert "--sizes is missing: eap rank" in mistake(*asked, "--methods", "eap")
    assert "--sizes x" in mistake(*asked, "--sizes", "x")
    assert "unknown method 'nope'" in mistake(*asked, "--methods", "nope", "--sizes", "5")
    few = [*asked, "--methods", "eap,ugs", "--sizes", "5", "--set"]
    assert "unknown name 'acdc', expected one of eap, ugs" in mistake(*few, "acdc.threshold=1")
    assert "--set of ugs steps=" in mistake(*few, "ugs.steps=x")
    assert not (tmp_path / "new" / "settings.json").exists()
