"""`tl-edgeprune demo`, on a tiny model in place of SmolLM2-135M and 16 pairs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support import ioi_model
from support.command_line import left, told

from tl_edgeprune import Circuit, tasks
from tl_edgeprune.commands.jobs import demo as demonstration
from tl_edgeprune.evaluation.evaluate import evaluate, evaluate_groups
from tl_edgeprune.methods.eap import eap


@pytest.mark.parametrize("task", ["ioi-t1", "ioi"])
def test_it_writes_and_tells_what_it_found(task: str, tmp_path: Path, monkeypatch: Any) -> None:
    model, asked = ioi_model.model(), []
    monkeypatch.setattr("tl_edgeprune.models.load", lambda name: asked.append(name) or model)
    monkeypatch.setattr(demonstration, "PAIRS", 16)
    out = tmp_path / "demo"
    result = told("demo", "--task", task, "--n-edges", 10, "--steps", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert asked == ["smollm2-135m"]
    assert left(out) == {"circuit.json", "history.png", "circuit.html"}

    held_out, train = tasks.load(task, model, 16, 0).split(0.25, 0)
    circuit = Circuit.load(out / "circuit.json")
    ours = evaluate(model, circuit, held_out)
    theirs = evaluate(model, eap(model, train).top(10), held_out)
    assert circuit.n_edges == 10 and circuit.metadata["method"] == "edge-pruning"
    assert circuit.metadata["held_out"] == pytest.approx(ours.to_dict(), abs=1e-5)
    page = (out / "circuit.html").read_text(encoding="utf-8")
    assert f"{task} in SmolLM2-135M: 10 edges" in page and "KL to the full model" in page
    assert (out / "history.png").read_bytes()[:4] == b"\x89PNG"

    told_of = f"Task {task}: 12 pairs to train on, 4 held out."
    assert told_of in result.stdout and "10 of " in result.stdout
    table = {
        "KL to the full model": [f"{ours.kl:.3f}", f"{theirs.kl:.3f}", "0"],
        "edges alive": [str(ours.n_alive), str(theirs.n_alive), str(circuit.graph.n_edges)],
    }
    for name, row in table.items():
        (line,) = re.findall(rf"^{name} +(.*)$", result.stdout, re.M)
        assert line.split() == row
    _, _, by_template = result.stdout.partition("KL by template")
    rows = [line.split() for line in by_template.split("\n\n")[0].splitlines()[1:]]
    groups = evaluate_groups(model, [circuit], held_out) if task == "ioi" else {}
    assert [int(row[-1]) for row in rows] == [found.n_pairs for (found,) in groups.values()]
    kls = [found.kl for (found,) in groups.values()]
    assert [float(row[-3]) for row in rows] == pytest.approx(kls, abs=6e-4)
