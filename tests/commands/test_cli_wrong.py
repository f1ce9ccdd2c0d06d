"""What the commands say to mistakes that show before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import mistake, told

from tl_edgeprune import EdgeGraph, EdgeScores
from tl_edgeprune.commands.common.inputs import Inputs
from tl_edgeprune.commands.common.run_folder import Run, write_json

INPUTS = Inputs("smollm2-135m", "ioi", device="cpu")
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
CONFIGS: dict[str, dict[str, Any]] = {
    "small": GPT2 | {"vocab_size": 50257},
    "no-words": GPT2,
    "no-size": {"model_type": "llama", "num_attention_heads": 4},
}
PRUNE = "--n-edges 9 --out new --dry-run"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    """The working folder: three runs, files of another graph, models' configs without weights."""
    for name, command in (("prune", "prune"), ("discover", "discover"), ("other", "show")):
        write_json(tmp_path / name / "settings.json", Run.new(command, INPUTS, {}).to_dict())
    for path, layers in (("prune/circuit", 2), ("other", 1)):
        graph = EdgeGraph(layers, 2, 2)
        scores = EdgeScores(graph, torch.arange(graph.n_edges) / graph.n_edges)
        scores.save(tmp_path / f"{path}.safetensors")
        scores.top(9).save(tmp_path / f"{path}.json")
        (tmp_path / f"{path}.html").write_text("the run's own")
    for name, config in CONFIGS.items():
        write_json(tmp_path / name / "config.json", config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tl_edgeprune.models.load", None)
    return tmp_path


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("evaluate prune/circuit.json --batch-size 0", "--batch-size 0: expected 1 or more"),
        ("evaluate prune/circuit.json --pairs 3", "--pairs and --task-set are for --task"),
        ("evaluate prune/circuit.json --task-set x=1", "--pairs and --task-set are for --task"),
        ("evaluate prune/circuit.json --dtype float8", "--dtype 'float8': expected one of float32"),
        ("evaluate prune/circuit.json --cls nope", "--cls 'nope': expected one of bridge, hooked"),
        ("evaluate prune/circuit.json --ablation nope", "unknown ablation 'nope'"),
        ("evaluate prune/circuit.json --ablation optimal", "put the run's there"),
        ("compare gpt2 ioi --sizes 5 --out new --batch-size 0", "--batch-size 0: expected 1"),
        ("compare gpt2 ioi --sizes 5,0 --out new", "--sizes 0: expected whole numbers of 1 or"),
        ("compare gpt2 ioi --sizes 2.5 --out new", "--sizes 2.5: expected whole numbers of 1 or"),
        ("discover gpt2 ioi --method eap --n-edges 0 --out new", "--n-edges 0: a circuit needs at"),
        (
            "show prune/circuit.json --other other.json",
            "other.json is of another graph than prune/circuit.json",
        ),
        (
            "show prune/circuit.json --scores other.safetensors",
            "other.safetensors is of another graph than prune/circuit.json",
        ),
        ("resume discover", "settings.json is damaged: 'method'"),
        ("resume other", "other holds a run of show, which writes no checkpoint"),
        ("discover gpt2 ioi --method eap --ablation optimal --out new", "needs the constants that"),
        ("discover gpt2 ioi --method ugs --ablation optimal --out new", "needs the constants that"),
        ("compare gpt2 ioi --sizes 5 --ablation nope --out new", "unknown ablation 'nope'"),
        ("compare gpt2 ioi --methods eap --sizes 5 --set eap=3 --out new", "such as eap.steps=5"),
        ("discover gpt2 ioi --method acdc --dry-run --out new", "needs threshold: give --set thr"),
        ("discover gpt2 ioi --method acdc --set threshold=1 --signed --out new", "ranks no edges"),
        ("discover gpt2 ioi --method eap --signed --out new", "--signed is for a circuit's edges"),
        ("discover gpt2 ioi --method eap --alive --out new", "--alive is for a circuit's edges"),
        ("plan --model gpt2 --gpu-memory 0.1", "Take shorter prompts or a larger GPU"),
        ("show prune", "prune is a folder: give its circuit, prune/circuit.json"),
        ("show prune/circuit.json --out prune/circuit.json", "its name must end in .html"),
        ("show prune/circuit.json", "prune/circuit.html is there already: open it, or give --out"),
        ("evaluate other", "other is a folder: give its circuit"),
        (f"prune ./no-size ioi {PRUNE}", "config.json is damaged (KeyError('hidden_size')): save"),
        (f"prune ./no-words ioi {PRUNE}", "config.json is damaged (KeyError('vocab_size'))"),
        (f"prune smollm2-135m ioi {PRUNE} --tokens 0", "--tokens 0: expected 1 or more"),
    ],
)
def test_what_is_wrong_is_told(arguments: str, message: str, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert message in mistake(*arguments.split())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_gpt2_in_a_folder_has_the_planners_shape(folder: Path) -> None:
    """Its plan is made of its config alone."""
    plan = json.loads(told("prune", "./small", "ioi", *PRUNE.split(), "--json").stdout)
    known = json.loads(told("prune", "gpt2", "ioi", *PRUNE.split(), "--json").stdout)
    assert plan["edges"] == known["edges"] == 32_491
    assert plan["bytes_with_recompute"] == known["bytes_with_recompute"]
