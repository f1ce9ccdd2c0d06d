"""Write the files here. Run it on commit a3bbab9 only: from another one they would be other files.

    git worktree add ../a3bbab9 a3bbab9 && cd ../a3bbab9
    cp -r <this folder> tests/data/a3bbab9
    PYTHONPATH=. python tests/data/a3bbab9/make.py

A run is stopped by Ctrl-C right after it has written its checkpoint for the n-th time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas
import torch
from cases import (
    COMMANDS,
    COMPARISONS,
    DATA,
    ELIMINATION,
    FEW,
    PRUNERS,
    SEARCHES,
    SIIT,
    TRACR,
    comparison,
    load,
    probe,
    pruner,
    pruners,
    scores,
)
from safetensors.torch import save_file

from tl_edgeprune import (
    Circuit,
    Constants,
    EdgeGraph,
    EdgeScores,
    PruneResult,
    discover,
    eliminate,
    evaluate,
    optimal_constants,
)
from tl_edgeprune.cli import main

COMMIT = "a3bbab9"
ROOT = DATA.parents[2]
CHECKPOINTS = DATA / "checkpoints"
EXPECTED_TENSORS = DATA / "expected.safetensors"
PARTS = ("inputs", "z", "mlp")  # of constants
# The part of a search's saves that is waited for, by default half of them.
AT = {"acdc-groups": 0.35, "acdc-singles": 0.9, "ugs": 0.3, "subnetwork-probing": 0.3}
PICTURES = ("circuit.html", "history.png", "comparison.png")  # written, and never read

expected: dict[str, Any] = {}
tensors: dict[str, torch.Tensor] = {}


# --------------------------------------------------------------------------------------- stopping


@contextmanager
def stopped(ending: str, at: float) -> Iterator[list[int]]:
    """Every state is saved, and Ctrl-C comes after the save number `at` of a file of this ending.

    Gives a list with an entry for each save.
    """
    replace, now = os.replace, time.monotonic
    jumps, saves = iter(range(0, 10**9, 1000)), []

    def counted(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target).endswith(ending):
            saves.append(len(saves) + 1)
            if len(saves) == at:
                raise KeyboardInterrupt

    with patch("os.replace", counted), patch("time.monotonic", lambda: now() + next(jumps)):
        yield saves


def stop(run: Callable[[], Any], ending: str, at: float) -> None:
    with stopped(ending, at):
        try:
            run()
        except KeyboardInterrupt:
            return


def saves_of(run: Callable[[], Any], ending: str) -> int:
    """How often a whole run saves."""
    with stopped(ending, math.inf) as saves:
        run()
    return len(saves)


def resumed(checkpoint: Path, run: Callable[[Path], Any]) -> Any:
    """What a run comes to that goes on from a copy of the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / checkpoint.name
        shutil.copy(checkpoint, copy)
        return run(copy)


# ------------------------------------------------------------------------------------------ parts


def results() -> None:
    """Circuits, scores and constants; a circuit and scores as MIB has them."""
    model, task = load(SIIT)
    graph = EdgeGraph.from_model(model)
    eap = discover(model, task, "eap", **FEW, progress=False)
    eap.save(DATA / "scores.safetensors")
    learned = optimal_constants(model, task, steps=5, batch_size=4, progress=False)
    learned.save(DATA / "constants.safetensors")
    keep("constants", learned)
    compiled, prompts = load(TRACR)
    in_spans = discover(compiled, prompts, "mask-ig", positions="span", progress=False)
    in_spans.save(DATA / "scores-spans.safetensors")
    tensors.update({"scores": eap.tensor, "scores-spans": in_spans.tensor})
    circuit, spans = eap.top(20), in_spans.top(40)
    circuit.save(DATA / "circuit.json")
    spans.save(DATA / "circuit-spans.json")
    circuit.to_mib(DATA / "mib-circuit.json")
    eap.to_mib(DATA / "mib-scores.json")
    assert Circuit.from_mib(DATA / "mib-circuit.json", graph) == circuit
    expected["results"] = {
        "circuit": list(circuit.edges),
        "circuit-spans": list(spans.edges),
        "metadata": {"circuit": circuit.metadata, "scores-spans": in_spans.metadata},
        "figures": {
            "circuit": evaluate(model, circuit, task).to_dict(),
            "constants": evaluate(model, circuit, task, ablation=learned).to_dict(),
            "circuit-spans": evaluate(compiled, spans, prompts).to_dict(),
        },
    }


def keep(name: str, constants: Constants) -> None:
    tensors.update({f"{name}/{part}": getattr(constants, part) for part in PARTS})


def pruned() -> None:
    """EdgePruner's checkpoints in the middle of runs, and what the runs came to."""
    expected["pruners"] = {}
    for name, (of, _) in PRUNERS.items():
        model, task = load(of)
        whole = pruner(name, None).fit(model, task)
        path = CHECKPOINTS / f"{name}.safetensors"
        stop(partial(fit, name, path), path.name, 1)
        rest = resumed(path, partial(fit, name))
        assert torch.equal(rest.log_alpha, whole.log_alpha), name
        tensors[f"{name}/log_alpha"] = whole.log_alpha
        saved = pruner(name, None).checkpoint_every
        note = {"saved": rest.history[:saved], "losses": [e["loss"] for e in whole.history]}
        expected["pruners"][name] = note | {"settings": pruner(name, None).settings()}
        if whole.constants is not None:
            keep(f"{name}/constants", whole.constants)
        if whole.neuron_log_alpha is not None:
            tensors[f"{name}/neurons"] = whole.neuron_log_alpha
        if name == "neurons":
            whole.neurons.save(DATA / "neurons-mlp.json")
            expected["neurons"] = list(whole.neurons.names)


def fit(name: str, checkpoint: Path) -> PruneResult:
    return pruner(name, checkpoint).fit(*load(PRUNERS[name][0]))


def searched() -> None:
    """Checkpoints in the middle of searches, and what the searches came to."""
    expected["searches"] = {}
    for name in (*SEARCHES, "elimination"):
        path, whole = CHECKPOINTS / f"{name}.safetensors", search(name, None)
        with tempfile.TemporaryDirectory() as folder:
            saves = saves_of(partial(search, name, Path(folder) / path.name), path.name)
        stop(partial(search, name, path), path.name, max(1, round(saves * AT.get(name, 0.5))))
        rest = resumed(path, partial(search, name))
        if isinstance(whole, Circuit):
            assert rest == whole and 0 < len(whole) < whole.graph.n_edges, name
            found = {"edges": list(whole.edges)}
        else:
            assert torch.equal(rest.tensor, whole.tensor), name
            tensors[f"{name}/scores"] = whole.tensor
            found = {}
        expected["searches"][name] = found | {"metadata": rest.metadata}
        print(name, saves)


def search(name: str, checkpoint: Path | None) -> EdgeScores | Circuit:
    model, task = load(SIIT)
    if name == "elimination":
        return eliminate(model, task, scores(), **ELIMINATION, checkpoint=checkpoint)
    method, settings = SEARCHES[name]
    return discover(model, task, method, **settings, checkpoint=checkpoint, progress=False)


def compared() -> None:
    """A comparison that ended, and one that was stopped in its second method."""
    for name in COMPARISONS:
        path = DATA / name
        ends = name == "compare"
        whole = comparison(name, path if ends else None)
        if not ends:
            stop(partial(comparison, name, path), "edge-pruning.checkpoint", 1)
            assert (path / "edge-pruning.checkpoint").is_file() and not [*path.glob("hisp*")]
        circuits = [list(circuit.edges) for circuit in whole.circuits]
        expected[name] = {"rows": list(whole.rows), "circuits": circuits}
        for method, found in whole.scores.items():
            tensors[f"{name}/{method}"] = found.tensor


def commanded() -> None:
    """The folders of tl-edgeprune's runs: some that ended, and some that were stopped."""
    expected["commands"] = {}
    for name, command in COMMANDS.items():
        arguments = [*command.split(), "--out"]
        kind, _, unfinished = name.partition("-")
        whole = "whole" if unfinished else name
        assert main([*arguments, whole]) == 0
        found = {}
        for file in ("circuit.json", "evaluation.json"):
            if Path(whole, file).is_file():
                found[file] = json.loads(Path(whole, file).read_text())
        if "circuit.json" in found:
            found["circuit.json"] = found["circuit.json"]["edges"]
        if unfinished and kind == "compare":
            table = pandas.read_csv(Path(whole, "table.csv")).drop(columns=["seconds", "peak_mb"])
            found["table.csv"] = table.to_dict("list")
        if Path(whole, "scores.safetensors").is_file():
            tensors[f"{name}/scores"] = EdgeScores.load(Path(whole, "scores.safetensors")).tensor
        if unfinished:
            shutil.rmtree(whole)
            ending = "edge-pruning.checkpoint" if kind == "compare" else "checkpoint.safetensors"
            with stopped(ending, 4 if kind == "discover" else 1):
                assert main([*arguments, name]) == 130
        expected["commands"][name] = found
        shutil.copytree(name, DATA / "commands" / name)


def clean() -> None:
    """Take away what earlier calls wrote."""
    for path in DATA.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("make.py", "cases.py", "README.md"):
            path.unlink()
    CHECKPOINTS.mkdir()


def write() -> None:
    """The commit, and what was found; pictures, pages and locks are not kept."""
    found = subprocess.check_output(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, text=True)
    assert found.strip() == COMMIT, f"this is {found.strip()}, not {COMMIT}"
    expected["settings"] = {name: each.settings() for name, each in pruners().items()}
    expected["probe"] = probe()
    note = json.dumps(expected, indent=1, allow_nan=True)
    (DATA / "expected.json").write_text(note + "\n", encoding="utf-8")
    save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, EXPECTED_TENSORS)
    for path in DATA.rglob("*"):
        if path.name in PICTURES or path.suffix == ".lock" or path.name == ".lock":
            path.unlink()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as in tests
    clean()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for part in (results, pruned, searched, compared, commanded):
            part()
    write()
