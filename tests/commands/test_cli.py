"""The command line on a tiny Llama in a folder, with a word-level tokenizer and a file of pairs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from support import tokenizer_models
from support.command_line import SMALL, left, mistake, told
from support.interrupts import stop_at_step

import tl_edgeprune
from tl_edgeprune import Circuit, EdgePruner, EdgeScores, Neurons, tasks
from tl_edgeprune.methods.registry import METHODS
from tl_edgeprune.runs.checkpoint import load as load_checkpoint


@pytest.fixture(scope="module")
def run(llama: str, gifts: str, tmp_path_factory: Any) -> Path:
    """A finished run of 30 steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = told("prune", llama, gifts, *SMALL, "--steps", 30, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["evaluation"] == json.loads((out / "evaluation.json").read_text())
    assert left(out) == {*printed["files"], "settings.json", "checkpoint.safetensors"}
    return out


def test_prune_writes_what_it_says(run: Path, llama: str, gifts: str) -> None:
    settings = json.loads((run / "settings.json").read_text())
    assert settings["command_line"].startswith(f"tl-edgeprune prune {llama}")
    assert settings["inputs"]["task"] == gifts and settings["seed"] == 0
    assert {"tl_edgeprune", "torch", "transformer-lens"} <= set(settings["versions"])
    assert settings["settings"]["n_edges"] == 20
    circuit, scores = (
        Circuit.load(run / "circuit.json"),
        EdgeScores.load(run / "scores.safetensors"),
    )
    assert circuit.n_edges == 20 and scores.top(20) == circuit
    note = load_checkpoint(run / "checkpoint.safetensors").note
    assert len(note["history"]) == 30
    assert (run / "history.png").read_bytes()[:4] == b"\x89PNG"
    assert "KL to the full model" in (run / "circuit.html").read_text(encoding="utf-8")


def test_the_circuit_is_that_of_the_pruner(run: Path, llama: str, gifts: str) -> None:
    loaded: Any = tl_edgeprune.models.load(llama, device="cpu")
    train = tl_edgeprune.tasks.from_jsonl(gifts, loaded).split(0.25, 0)[1]
    pruner = EdgePruner(20, steps=30, batch_size=4, progress=False)
    assert pruner.fit(loaded, train).circuit == Circuit.load(run / "circuit.json")


def test_evaluate_gives_the_figures_of_the_run(run: Path, gifts: str, tmp_path: Path) -> None:
    figures = json.loads(told("evaluate", run / "circuit.json", "--json").stdout)
    expected = json.loads((run / "evaluation.json").read_text())
    assert figures["n_pairs"] == 4 and figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name] == (None if value is None else pytest.approx(value, abs=1e-5)), name
    out = tmp_path / "figures.json"
    result = told("evaluate", run / "circuit.json", "--task", gifts, "--out", out)
    assert "16 pairs of gifts" in result.stdout
    assert json.loads(out.read_text())["n_pairs"] == 16


def test_neurons_are_written_and_judged_with_the_circuit(
    llama: str, gifts: str, tmp_path: Path
) -> None:
    out, asked = tmp_path / "run", ["--neurons", "mlp", "--steps", 2, "--json"]
    assert "--n-neurons is missing" in mistake("prune", llama, gifts, *SMALL, *asked, "--out", out)
    asked += ["--n-neurons", 9]
    result = told("prune", llama, gifts, *SMALL, *asked, "--out", out)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    found = printed["evaluation"]
    assert left(out) == {*printed["files"], "settings.json", "checkpoint.safetensors"}
    kept = Neurons.load(out / "neurons.json")
    assert found["n_neurons"] == kept.n_neurons == 9
    again = json.loads(told("evaluate", out / "circuit.json", "--json").stdout)
    assert again == pytest.approx(found, abs=1e-5)
    (out / "neurons.json").unlink()
    assert json.loads(told("evaluate", out / "circuit.json", "--json").stdout)["kl"] != found["kl"]


def test_learned_constants_are_written_and_judged_with_the_circuit(
    llama: str, gifts: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = told(
        *("prune", llama, gifts, *SMALL, "--steps", 2, "--ablation", "optimal", "--out", out)
    )
    assert result.exit_code == 0, result.output
    names = result.stdout.splitlines()[-1].removeprefix(f"In {out}/: ").removesuffix(".")
    assert left(out) == {*names.split(", "), "settings.json", "checkpoint.safetensors"}
    assert "constants.safetensors" in names
    found = json.loads((out / "evaluation.json").read_text())
    evaluate = ["evaluate", out / "circuit.json", "--json"]
    assert json.loads(told(*evaluate).stdout) == pytest.approx(found, abs=1e-5)
    (out / "constants.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert "put the run's there, or give --ablation" in mistake(*evaluate)
    given = json.loads(told(*evaluate, "--ablation", tmp_path / "elsewhere.safetensors").stdout)
    assert given == pytest.approx(found, abs=1e-5)
    assert json.loads(told(*evaluate, "--ablation", "zero").stdout)["kl"] != found["kl"]


def test_a_circuit_from_elsewhere_is_judged_on_what_is_given(
    run: Path, llama: str, gifts: str, tmp_path: Path
) -> None:
    circuit = tmp_path / "circuit.json"
    circuit.write_bytes((run / "circuit.json").read_bytes())
    judged = told("evaluate", circuit, "--model", llama, "--task", gifts, "--json")
    assert judged.exit_code == 0, judged.output
    assert judged.stdout == told("evaluate", run / "circuit.json", "--task", gifts, "--json").stdout


def test_show_writes_a_page(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "x.html"
    scores = ["--scores", run / "scores.safetensors", "--title", "Gifts & names"]
    assert told("show", run / "circuit.json", "--out", page, *scores).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "Gifts &amp; names" in text and "KL to the full model" in text  # of evaluation.json


def test_show_draws_two_circuits_in_every_form(run: Path, tmp_path: Path) -> None:
    circuit = Circuit.load(run / "circuit.json")
    other = tmp_path / "other.json"
    EdgeScores.load(run / "scores.safetensors").top(30).save(other)
    files = {name: tmp_path / "new" / f"x.{name}" for name in ("html", "svg", "png", "dot")}
    pictures = [word for name in ("svg", "png", "dot") for word in (f"--{name}", files[name])]
    arguments = ["--out", files["html"], "--other", other, *pictures]
    shown = told("show", run / "circuit.json", *arguments)
    assert shown.exit_code == 0
    assert '"mode":"overlay"' in files["html"].read_text(encoding="utf-8")
    assert "in both (20)" in files["svg"].read_text(encoding="utf-8")
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    assert files["dot"].read_text(encoding="utf-8") == circuit.to_dot()
    assert all(str(path) in shown.stdout for path in files.values())
    wrong = mistake("show", run / "circuit.json", "--svg", tmp_path / "x.png")
    assert "its name must end in .svg" in wrong


def test_a_run_that_was_stopped_goes_on_to_the_same_circuit(
    run: Path, llama: str, gifts: str, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_at_step(patch, 27)
        result = told("prune", llama, gifts, *SMALL, "--steps", 30, "--out", out)
    assert result.exit_code == 130
    assert f"after 27 of 30 steps. Go on with tl-edgeprune resume {out}" in result.stderr
    assert not (out / "circuit.json").exists()
    assert told("resume", out, "--json").exit_code == 0
    ours, whole = (EdgeScores.load(f / "scores.safetensors") for f in (out, run))
    assert torch.equal(ours.tensor, whole.tensor)
    assert Circuit.load(out / "circuit.json") == Circuit.load(run / "circuit.json")
    assert "finished run" in mistake("resume", out)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_circuit(llama: str, gifts: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    asked = [llama, gifts, *SMALL, "--steps", 300]
    assert told("prune", *asked, "--out", whole, "--json").exit_code == 0
    command = [sys.executable, "-m", "tl_edgeprune", "prune", *map(str, asked), "--out", killed]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (killed / "checkpoint.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (killed / "circuit.json").exists()
    assert told("resume", killed, "--json").exit_code == 0
    ours, theirs = (EdgeScores.load(f / "scores.safetensors") for f in (killed, whole))
    assert torch.equal(ours.tensor, theirs.tensor)


@pytest.mark.slow
def test_prune_under_torchrun(run: Path, llama: str, gifts: str, tmp_path: Path) -> None:
    out = tmp_path / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    asked = ["prune", llama, gifts, *SMALL, "--steps", "30", "--device", "cpu", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "2", "-m", "tl_edgeprune", *asked, "--json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["evaluation"]["n_edges"] == 20
    alone = EdgeScores.load(run / "scores.safetensors").tensor
    torch.testing.assert_close(EdgeScores.load(out / "scores.safetensors").tensor, alone)


def test_a_dry_run_runs_nothing(llama: str, gifts: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tl_edgeprune.models.load", None)
    out = tmp_path / "none"
    asked = ["prune", llama, gifts, *SMALL, "--steps", 7, "--out", out, "--dry-run"]
    plan = json.loads(told(*asked, "--json").stdout)
    loaded = tl_edgeprune.EdgeGraph(2, 4, 2)
    assert (plan["edges"], plan["steps"], plan["pairs_a_step"]) == (loaded.n_edges, 7, 4)
    assert (plan["pairs_found_on"], plan["pairs_judged_on"]) == (12, 4)
    assert plan["bytes_with_recompute"]["in all"] > 0 and plan["seconds_at_least"] > 0
    assert "Nothing was run." in told(*asked).stdout
    in_spans = json.loads(told(*asked, "--positions", "span", "--json").stdout)
    assert in_spans["edges"] is None  # the task's spans are known once it is loaded
    methods = {"eap": [], "ugs": ["--set", "steps=3"], "exact": []}
    for name, more in methods.items():
        asked_too = ["discover", llama, gifts, "--method", name, *more, "--out", out, "--dry-run"]
        seconds = json.loads(told(*asked_too, "--json").stdout)["seconds_at_least"]
        assert (seconds[name] is None) == (name == "exact")
    compared = ["compare", llama, gifts, "--methods", "eap,acdc", "--sizes", "5,12", "--out", out]
    compared += ["--set", "acdc.threshold=0.1", "--dry-run"]
    assert json.loads(told(*compared, "--json").stdout)["sizes"] == [5, 12]
    assert "seconds at least" in told(*compared).stdout
    assert not out.exists()
    assert "expected a whole number" in mistake(*asked, "--n-edges", 10**6)
    in_spans = told(*asked, "--n-edges", 10**6, "--positions", "span", "--json").stdout
    assert json.loads(in_spans)["edges"] is None  # as many as the task has spans


def test_a_dry_run_takes_the_prompts_own_length(llama: str, gifts: str, tmp_path: Path) -> None:
    """13 words; of IOI, whose words are tokens here. Without a tokenizer, 64 and "about"."""

    def plan(model: Any, task: str, *more: Any) -> Any:
        asked = ["prune", model, task, *SMALL, "--out", tmp_path / "none", "--dry-run", *more]
        return json.loads(told(*asked, "--json").stdout), told(*asked).stdout

    own, shown = plan(llama, gifts)
    assert own["tokens_a_prompt"] == own["tokens_of_the_longest"] == 13
    assert own == plan(llama, gifts, "--tokens", 13)[0] | {"seconds_at_least": ANY}
    assert "about" not in shown and "assumed" not in shown

    talking = shutil.copytree(llama, tmp_path / "talking")
    tokenizer_models.load("digits").tokenizer.save_pretrained(talking)
    lengths = [len(p) for p in tasks.load("ioi", tokenizer_models.load("digits"), 256).clean]
    named, _ = plan(talking, "ioi")
    assert named["tokens_a_prompt"] == sum(lengths) // 256 < 20
    assert named["tokens_of_the_longest"] == max(lengths) and "seconds_at_least" in named

    for file in talking.glob("tokenizer*"):
        file.unlink()
    unknown, shown = plan(talking, "ioi")
    assert unknown["tokens_a_prompt"] == 64 and "seconds_at_least" not in unknown
    assert unknown["seconds_about"] > 0
    assert "seconds about" in shown and "tokens were assumed: give --tokens" in shown


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--n-edges", 0], "n_edges=0"),
        (["--n-edges", 10**6], "from 1 to"),
        (["--steps", 0], "steps=0: expected 1 or more"),
        (["--lr", -1], "lr=-1.0: expected a number above 0"),
        (["--held-out", 1], "--held-out 1: expected a share"),
        (["--pairs", 1], "--pairs 1: expected 2 or more"),
        (["--pairs", 99], "holds 16"),
        (["--ablation", "nope"], "unknown ablation 'nope'"),
        (["--objective", "nope"], "--objective 'nope': expected one of kl"),
        (["--device", "nope"], "--device 'nope'"),
        (["--device", "cuda:77"], "--device cpu"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_numbers_and_names(
    changes: list[Any], message: str, llama: str, gifts: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if message == "--device cpu" and torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    assert message in mistake("prune", llama, gifts, *SMALL, "--out", out, "--json", *changes)
    assert not (out / "settings.json").exists()  # so that the next try may have the folder


def test_wrong_models_tasks_and_files(llama: str, gifts: str, run: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    assert "no such folder" in mistake("prune", "./nope", gifts, *SMALL, *out)
    assert "no config.json" in mistake("prune", tmp_path, gifts, *SMALL, *out)
    assert "not one of" in mistake("prune", "no-such-model", gifts, *SMALL, *out, "--json")
    assert "unknown task 'nope'" in mistake("prune", llama, "nope", *SMALL, *out)
    assert "no such file" in mistake("prune", llama, "nope.jsonl", *SMALL, *out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"clean": 3}')
    assert "line 1" in mistake("prune", llama, bad, *SMALL, *out, "--json")
    assert "unknown method 'nope'" in mistake("discover", llama, gifts, "--method", "nope", *out)
    eap = ["discover", llama, gifts, "--method", "eap", *out, "--set"]
    assert "unknown name 'batchsize'" in mistake(*eap, "batchsize=1")
    assert "Did you mean batch_size?" in mistake(*eap, "batchsize=1")
    assert 'batch_size="x": expected int' in mistake(*eap, "batch_size=x")
    assert "expected NAME=VALUE" in mistake(*eap, "batch_size")
    assert "no such file" in mistake("evaluate", tmp_path / "nope.json")
    assert "no circuit file" in mistake("show", bad)
    moved = tmp_path / "moved.json"
    moved.write_bytes((run / "circuit.json").read_bytes())
    assert "--model and --task" in mistake("evaluate", moved)
    assert "holds no run" in mistake("resume", tmp_path)


def test_two_runs_do_not_mix(run: Path, llama: str, gifts: str, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for arguments in (["prune", *SMALL], ["discover", "--method", "eap"]):
        line = mistake(arguments[0], llama, gifts, *arguments[1:], "--out", run)
        assert "holds another run" in line and "runs do not mix: give a new folder" in line
    line = mistake("prune", llama, gifts, *SMALL, "--steps", 30, "--out", run)
    assert "holds this run (" in line and "and it is finished." in line
    assert f"Open {run / 'circuit.html'}" in line and "tl-edgeprune evaluate" in line
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in mistake("prune", llama, gifts, *SMALL, "--out", file)


def test_debug_shows_where_an_error_came_from(tmp_path: Path, monkeypatch: Any) -> None:
    assert "Traceback" in told("resume", tmp_path, "--debug").stderr
    monkeypatch.setenv("TL_EDGEPRUNE_DEBUG", "1")
    result = told("resume", tmp_path)
    assert "Traceback" in result.stderr and result.exit_code == 1


@pytest.mark.parametrize("arguments", [["prune"], ["prune", "a", "b", "--steps", "x"], ["nope"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = told(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_lists() -> None:
    for name, known in (
        ("tasks", tl_edgeprune.tasks.list()),
        ("models", tl_edgeprune.models.list()),
        ("methods", METHODS),
    ):
        assert json.loads(told(name, "--json").stdout) == [*known]
        assert set(known) <= set(told(name).stdout.split())


def test_help_teaches_by_examples_and_loads_no_torch() -> None:
    assert told("--version").stdout == f"tl-edgeprune {tl_edgeprune.__version__}\n"
    for name in ("prune", "resume", "evaluate", "discover", "compare", "plan", "show", "tasks"):
        assert f"Example: tl-edgeprune {name}" in told(name, "--help").stdout
    code = "import sys, tl_edgeprune.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
