"""`tl-edgeprune discover`: what it writes is what the method finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import left, mistake, told

import tl_edgeprune
from tl_edgeprune import Circuit, EdgeScores
from tl_edgeprune.methods.registry import METHODS
from tl_edgeprune.runs import resume as saved
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.search.partial_cuts import PartialCuts
from tl_edgeprune.training.trainer import Trainer


def test_discover_saves_scores_and_a_circuit(llama: str, gifts: str, tmp_path: Path) -> None:
    out = tmp_path / "ig"
    arguments = ["--method", "mask-ig", "--set", "batch_size=4", "--n-edges", 15, "--out", out]
    arguments += ["--ablation", "zero"]
    result = told("discover", llama, gifts, *arguments, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["evaluation"]["n_edges"] == 15
    scores = EdgeScores.load(out / "scores.safetensors")
    circuit = Circuit.load(out / "circuit.json")
    assert scores.top(15) == circuit and circuit.metadata["ablation"] == "zero"
    judged = json.loads(told("evaluate", out / "circuit.json", "--json").stdout)
    assert judged["n_edges"] == 15 and judged["n_pairs"] == 4


def test_acdc_writes_its_circuit(llama: str, gifts: str, tmp_path: Path) -> None:
    out = tmp_path / "acdc"
    asked = ["--method", "acdc", "--set", "threshold=0.05", "--pairs", 8, "--out", out, "--json"]
    result = told("discover", llama, gifts, *asked)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    files = ["circuit.json", "evaluation.json", "circuit.html"]
    assert printed["files"] == files and left(out) == {*files, "settings.json"}
    loaded: Any = tl_edgeprune.models.load(llama, device="cpu")
    train = tl_edgeprune.tasks.from_jsonl(gifts, loaded)[:8].split(0.25, 0)[1]
    expected = tl_edgeprune.discover(loaded, train, "acdc", threshold=0.05)
    circuit = Circuit.load(out / "circuit.json")
    assert circuit == expected and 0 < circuit.n_edges < circuit.graph.n_edges
    figures = json.loads((out / "evaluation.json").read_text())
    assert printed["evaluation"] == figures
    assert (figures["n_edges"], figures["n_pairs"]) == (circuit.n_edges, 2)
    assert json.loads(told("evaluate", out / "circuit.json", "--json").stdout) == figures
    assert "KL to the full model" in (out / "circuit.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", [n for n, made in METHODS.items() if made.gives_circuit])
def test_a_size_for_a_method_that_chooses_it_is_refused_before_the_search(
    method: str, llama: str, gifts: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tl_edgeprune.models.load", None)
    out = tmp_path / "out"
    asked = ["discover", llama, gifts, "--method", method, "--set", "threshold=0.1", "--out", out]
    for more in ([], ["--dry-run"]):
        assert "chooses the circuit's size itself" in mistake(*asked, "--n-edges", 100, *more)
    assert not out.exists()


def test_methods_that_give_circuits_are_those_that_say_so() -> None:
    annotated = {name: made.__annotations__["return"] for name, made in METHODS.items()}
    assert {name for name, kind in annotated.items() if "Circuit" in str(kind)} == {
        name for name, method in METHODS.items() if method.gives_circuit
    }


SEARCHES = {
    "edge-pruning": "--set steps=4 --set init_scores=null --n-edges 9",
    "eap-ig": "--set batch_size=2 --n-edges 9",
    "acdc": "--set threshold=0.05 --pairs 8",
    "mask-ig": "--set batch_size=2",
}
EACH = [
    "edge-pruning",
    "acdc",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("eap-ig", "mask-ig")),
]


@pytest.mark.parametrize("method", EACH)
def test_a_search_that_was_stopped_goes_on(
    method: str, llama: str, gifts: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(saved, "SAVE_SECONDS", 0.0)
    asked = ["discover", llama, gifts, "--method", method, *SEARCHES[method].split()]
    expected = told(*asked, "--out", tmp_path / "whole", "--json")
    assert expected.exit_code == 0, expected.output
    out, looks = tmp_path / "stopped", 0

    def stopping(of: Any) -> Any:
        def look(self: Any, *arguments: Any) -> Any:
            nonlocal looks
            looks += 1
            if looks == (12 if method == "acdc" else 3):
                raise KeyboardInterrupt
            return of(self, *arguments)

        return look

    with monkeypatch.context() as patch:
        for part, name in ((Trainer, "_step"), (PartialCuts, "losses"), (Targets, "prepare")):
            patch.setattr(part, name, stopping(getattr(part, name)))
        result = told(*asked, "--out", out)
    assert (result.exit_code, result.stdout) == (130, "")
    assert f"stopped. Go on with tl-edgeprune resume {out}" in result.stderr
    assert left(out) == {"settings.json", "checkpoint.safetensors"}
    assert "holds this run" in mistake(*asked, "--out", out)
    result = told("resume", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(expected.stdout) | {"out": str(out)}
    assert left(out) == left(tmp_path / "whole")
    for file in {"scores.safetensors", "circuit.json"} & left(out):
        kind = Circuit if file == "circuit.json" else EdgeScores
        ours, theirs = kind.load(out / file), kind.load(tmp_path / "whole" / file)
        assert ours == theirs if kind is Circuit else torch.equal(ours.tensor, theirs.tensor)
    assert "holds a finished run" in mistake("resume", out)


def test_what_a_search_cannot_do_is_told_before_it(
    llama: str, gifts: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Targets, "prepare", None)
    out = tmp_path / "out"
    asked = ["discover", llama, gifts, "--out", out, "--method"]
    assert "n_edges=100000: expected" in mistake(*asked, "mask-ig", "--n-edges", 100000)
    assert "unknown edge 'm0->m9'" in mistake(*asked, "exact", "--set", 'edges=["m0->m9"]')
    assert "expected a list of names" in mistake(*asked, "exact", "--set", "edges=m0->m1")
    assert not out.exists() or left(out) == set()


def test_learned_constants_stay_with_what_was_found_under_them(
    llama: str, gifts: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """From another folder too: settings.json has the file's whole path."""
    loaded: Any = tl_edgeprune.models.load(llama, device="cpu")
    pairs = tl_edgeprune.tasks.from_jsonl(gifts, loaded)[:4]
    monkeypatch.chdir(tmp_path)
    tl_edgeprune.optimal_constants(loaded, pairs, steps=1, progress=False).save("k.safetensors")
    asked = ["--method", "eap", "--n-edges", 9, "--ablation", "k.safetensors", "--out", "found"]
    result = told("discover", llama, gifts, *asked, "--json")
    assert result.exit_code == 0, result.output
    settings = json.loads(Path("found/settings.json").read_text())["settings"]["settings"]
    assert settings["ablation"] == str(tmp_path / "k.safetensors")
    Path("k.safetensors").unlink()
    judged = json.loads(told("evaluate", "found/circuit.json", "--json").stdout)
    assert judged == json.loads(result.stdout)["evaluation"]
