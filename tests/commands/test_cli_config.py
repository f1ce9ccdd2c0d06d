"""Settings of the command line: from flags, from files, with the published ones to start from."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from support.command_line import mistake, told

from tl_edgeprune import Attachment, EdgePruner, ExactBudget, Lagrangian, Optimizer
from tl_edgeprune.cli import app
from tl_edgeprune.commands.common.run_folder import Run
from tl_edgeprune.commands.jobs import prune as training
from tl_edgeprune.commands.jobs import pruner_settings

FLAGS = """--n-edges 20 --steps 6 --batch-size 4 --controller lagrangian --controller warmup=0.5
--optimizer betas=[0.9,0.98] --optimizer warmup=2 --init-log-alpha 1 0.5 --node-masks
--attachment 0.01 --no-split-qkv --held-out 0.5 --device cpu""".split()
FILES = {
    "x.yaml": """
n-edges: 20
steps: 6
batch_size: 4
controller: {kind: lagrangian, warmup: 0.5}
optimizer: {betas: [0.9, 0.98], warmup: 2}
init-log-alpha: [1, 0.5]
node-masks: true
attachment: 1e-2
split-qkv: false
held-out: 0.5
device: cpu
""",
    "x.toml": """
n-edges = 20
steps = 99
batch-size = 4
held-out = 0.5
device = "cpu"
[evaluate]
pairs = 3
[prune]
steps = 6
init-log-alpha = [1.0, 0.5]
node-masks = true
attachment = 0.01
split-qkv = false
controller = {kind = "lagrangian", warmup = 0.5}
optimizer = {betas = [0.9, 0.98], warmup = 2}
""",
}


@pytest.fixture
def prune(llama: str, gifts: str, monkeypatch: Any) -> Any:
    """What `prune` would run, by its arguments."""
    runs: list[Run] = []
    monkeypatch.setattr(training, "train", lambda out, run, **_: runs.append(run))

    def asked(*arguments: object) -> Run:
        result = told("prune", llama, gifts, "--out", "nowhere", *arguments)
        assert result.exit_code == 0, result.output
        return runs.pop()

    return asked


def test_flags_and_files_say_the_same(prune: Any, tmp_path: Path) -> None:
    by_flags = prune(*FLAGS)
    expected = EdgePruner(
        20,
        steps=6,
        batch_size=4,
        controller=Lagrangian(warmup=0.5),
        optimizer=Optimizer(betas=(0.9, 0.98), warmup=2),
        init_log_alpha=(1.0, 0.5),
        node_masks=True,
        attachment=Attachment(0.01),
        split_qkv=False,
    )
    assert training.pruner_of(by_flags, tmp_path).settings() == expected.settings()
    assert by_flags.inputs.held_out == 0.5
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        run = prune("--config", tmp_path / name)
        assert (run.settings, run.inputs) == (by_flags.settings, by_flags.inputs)
        assert prune("--config", tmp_path / name, "--steps", 7).settings["steps"] == 7
    written = json.loads(json.dumps(by_flags.settings))
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump({"prune": written}), encoding="utf-8")
    assert prune("--config", again, "--held-out", 0.5).settings == by_flags.settings


def test_the_published_settings(prune: Any) -> None:
    run = prune("--paper", "--n-edges", 20)
    made = training.pruner_of(run, Path()).settings()
    assert made == EdgePruner.paper(20).settings()
    run = prune("--paper", "--n-edges", 20, "--steps", 9, "--controller", "start_sparsity=0.5")
    assert run.settings["steps"] == 9 and run.settings["lr"] == 0.8
    assert run.settings["controller"] == {
        "kind": "lagrangian",
        "target_sparsity": None,
        "start_sparsity": 0.5,
        "warmup": 2500 / 3000,
    }


def test_every_setting_of_edge_pruner_has_a_flag_that_tells_its_default() -> None:
    options = {p.name: p for p in typer.main.get_command(app).commands["prune"].params}  # type: ignore[attr-defined]
    told_by_the_folder = {"checkpoint", "sampler", "self"}
    assert set(inspect.signature(EdgePruner).parameters) - told_by_the_folder <= set(options)
    ours = pruner_settings.resolve_settings({"n_edges": 20})
    words = {True: "yes", False: "no"}
    for name, value in ours.items():
        shown = options[name].show_default
        if isinstance(shown, str) and name != "controller":
            plain = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            assert shown == (words[value] if isinstance(value, bool) else plain), name
    assert options["controller"].show_default == ours["controller"]["kind"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.yaml", "n-egdes: 3", "unknown setting 'n-egdes'. Did you mean n-edges? Known: model,"),
        ("x.toml", "[prune]\nmethod = 'eap'", "unknown setting 'method'"),
        ("x.toml", "[prun]\nsteps = 3", "unknown setting 'prun'"),
        ("x.yaml", "steps: 2.5", "Invalid value for '--steps'"),
        ("x.yaml", "steps: [2]", "steps: expected one value, not a list"),
        ("x.yaml", "steps: {a: 2}", "steps: expected a value, not a table"),
        ("x.yaml", "- 3", "it holds a list"),
        ("x.yaml", "a: [", "it is no YAML"),
        ("x.toml", "a = ", "Invalid value"),
        ("x.ini", "", "neither YAML (.yaml, .yml) nor TOML"),
        ("nope.yaml", None, "no such file"),
    ],
)
def test_wrong_files_are_wrong_usage(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    asked = ["prune", "a", "b", "--out", "c", "--config", tmp_path / name]
    result = told(*asked, "--json")
    error = json.loads(result.stderr)
    assert (result.exit_code, error["exit_code"], result.stdout) == (2, 2, "")
    assert message in error["error"]
    result = told(*asked)
    assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--controller", "nope"], "unknown name 'nope', expected one of exact-budget, lagrangian"),
        (["--controller", "lagrangain"], "Did you mean lagrangian?"),
        (["--controller", "warmpu=1"], "--controller: unknown name 'warmpu'"),
        (["--controller", "schedule=nope"], "--controller schedule="),
        (["--optimizer", "betas=3"], "--optimizer betas=3: expected tuple[float, float]"),
        (["--optimizer", "3"], "--optimizer: unknown name 'kind'"),
        (["--init-scores", "nope"], "init_scores='nope'"),
        (["--init-scores", "nope.safetensors"], "no file of scores at"),
        (["--node-controller", "penalty"], "node_controller needs node_masks=True"),
        (["--task-set", "nope=1"], "--task-set: unknown name 'nope'"),
        (["--task-set", "split=1"], "--task-set split=1: expected"),
    ],
)
def test_wrong_parts(changes: list[str], message: str, llama: str, gifts: str) -> None:
    asked = ["prune", llama, gifts, "--n-edges", 20, "--out", "nowhere", *changes]
    assert message in mistake(*asked, "--json")


def test_commands_and_files_of_the_page_are_valid(tmp_path: Path, monkeypatch: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    (file,) = re.findall(r'^```yaml title="ioi.yaml"\n(.*?)^```$', page, re.M | re.S)
    (tmp_path / "ioi.yaml").write_text(file, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    group: Any = typer.main.get_command(app)
    lines = "".join(re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)).replace("\\\n", "")
    commands = [shlex.split(line)[1:] for line in lines.splitlines() if line.startswith("tl-")]
    assert len(commands) >= 12
    parent = group.make_context("tl-edgeprune", ["tasks"])
    for name, *arguments in commands:
        group.commands[name].make_context(name, arguments, parent=parent)


def test_a_run_without_a_size(llama: str, gifts: str, prune: Any) -> None:
    assert "--n-edges is missing" in mistake("prune", llama, gifts, "--out", "nowhere")
    run = prune("--controller", "lagrangian", "--controller", "target_sparsity=0.9")
    assert run.settings["n_edges"] is None


def test_nobody_reads_the_output() -> None:
    code = (
        "import typer\n"
        "from tl_edgeprune.commands.common.errors import with_error_messages\n"
        "app = typer.Typer()\n"
        "app.command()(with_error_messages(lambda: print('line\\n' * 100_000)))\n"
        "app()"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None and writer.stdout.readline() == "line\n"
    writer.stdout.close()
    assert writer.stderr is not None and writer.stderr.read() == ""
    assert writer.wait() == 141


def test_a_plan_as_json() -> None:
    plan = json.loads(told("plan", "--model", "gpt2", "--gpu-memory", 24, "--json").stdout)
    assert plan["edges"] == 32_491 and plan["bytes"]["in all"] <= 24e9
    assert plan["passes"]["one training step"]["operations"] > 0


def test_defaults_that_hang_on_the_controller_are_those_of_python() -> None:
    controller = {"kind": "exact-budget", "schedule": "sampled"}
    ours = pruner_settings.resolve_settings({"n_edges": 10, "controller": controller})
    python = EdgePruner(10, controller=ExactBudget("sampled"))
    assert (ours["lr"], ours["average_share"]) == (python.lr, python.average_share)
