"""Files that commit a3bbab9 wrote still load, and its stopped runs go on to what it got.

tests/data/a3bbab9/README.md says what the files are. Only public names are imported here, so the
test does not depend on where the package keeps its modules. Where this machine computes the bits
of the one that wrote the files (`probe`), results must have the same bits.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tl_edgeprune import (
    Circuit,
    Comparison,
    Constants,
    EdgeGraph,
    EdgeScores,
    Neurons,
    PruneResult,
    discover,
    eliminate,
    evaluate,
)
from tl_edgeprune.cli import main

DATA = Path(__file__).parent / "data" / "a3bbab9"
PARTS = ("inputs", "z", "mlp")  # of constants
# Its Bridges order a model's weights otherwise, so a run of TransformerLens 4 is another run there.
goes_on = pytest.mark.skipif(
    version("transformer-lens").startswith("3."), reason="the runs are of TransformerLens 4"
)
OTHER = {"tl_edgeprune": "0.0.1", "transformer-lens": "3.9", "transformers": "5.0", "torch": "2.6"}


def _cases() -> Any:
    spec = importlib.util.spec_from_file_location("cases_of_a3bbab9", DATA / "cases.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cases = _cases()
expected = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))
tensors = load_file(DATA / "expected.safetensors")


@functools.cache
def same_machine() -> bool:
    """Whether bits can be compared with bits."""
    return cases.probe() == expected["probe"]


def check_computed(found: Any, wanted: Any) -> None:
    """What is computed anew: the same bits on the same machine, close on any other."""
    if isinstance(wanted, Tensor):
        rules = {"rtol": 0, "atol": 0} if same_machine() else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found, wanted, **rules)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            check_computed(found[name], value)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            check_computed(one, other)
    elif isinstance(wanted, float) and not same_machine():
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5, nan_ok=True)
    else:
        assert found == wanted or (math.isnan(found) and math.isnan(wanted))


def check_constants(found: Constants, name: str) -> None:
    for part in PARTS:
        check_computed(getattr(found, part), tensors[f"{name}/{part}"])


# -------------------------------------------------------------------------- files of other versions


def say_other_versions(path: Path) -> None:
    """Write into a file that other versions of the libraries wrote it. It must name some."""
    if path.suffix == ".json":
        document = json.loads(path.read_text(encoding="utf-8"))
        assert document["versions"].keys() == OTHER.keys()
        path.write_text(json.dumps(document | {"versions": OTHER}), encoding="utf-8")
        return
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["tl_edgeprune"])
    assert document["versions"].keys() == OTHER.keys()
    note = {"tl_edgeprune": json.dumps(document | {"versions": OTHER})}
    save_file(load_file(path), path, note)


@pytest.fixture(params=["versions as here", "other versions"])
def other_versions(request: Any) -> bool:
    return request.param == "other versions"


def copied(name: str, folder: Path, other: bool = False) -> Path:
    """A copy of a file or a folder of the data, which a run may write over."""
    source, copy = DATA / name, folder / Path(name).name
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        shutil.copy(source, copy)
    if other:
        files = [copy] if copy.is_file() else [*copy.iterdir()]
        for path in files:
            if path.name not in ("evaluation.json",):  # figures say no versions
                say_other_versions(path)
    return copy


# ------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("name", ["circuit", "circuit-spans"])
def test_circuits(name: str, tmp_path: Path, other_versions: bool) -> None:
    circuit = Circuit.load(copied(f"{name}.json", tmp_path, other_versions))
    assert list(circuit.edges) == expected["results"][name]
    model, task = cases.load(cases.TRACR if name == "circuit-spans" else cases.SIIT)
    judged = evaluate(model, circuit, task).to_dict()
    check_computed(judged, expected["results"]["figures"][name])


@pytest.mark.parametrize("name", ["scores", "scores-spans"])
def test_scores(name: str, tmp_path: Path, other_versions: bool) -> None:
    scores = EdgeScores.load(copied(f"{name}.safetensors", tmp_path, other_versions))
    assert torch.equal(scores.tensor, tensors[name]) and scores.by_magnitude
    circuit = "circuit-spans" if name == "scores-spans" else "circuit"
    wanted = expected["results"][circuit]
    assert list(scores.top(len(wanted)).edges) == wanted
    assert scores.metadata == Circuit.load(DATA / f"{circuit}.json").metadata
    assert scores.graph == Circuit.load(DATA / f"{circuit}.json").graph


def test_metadata() -> None:
    wanted = expected["results"]["metadata"]
    assert Circuit.load(DATA / "circuit.json").metadata == wanted["circuit"]
    assert EdgeScores.load(DATA / "scores-spans.safetensors").metadata == wanted["scores-spans"]


def test_constants() -> None:
    constants = Constants.load(DATA / "constants.safetensors")
    for part in PARTS:
        assert torch.equal(getattr(constants, part), tensors[f"constants/{part}"])
    circuit = Circuit.load(DATA / "circuit.json")
    model, task = cases.load(cases.SIIT)
    judged = evaluate(model, circuit, task, ablation=constants).to_dict()
    check_computed(judged, expected["results"]["figures"]["constants"])


def test_neurons(tmp_path: Path, other_versions: bool) -> None:
    neurons = Neurons.load(copied("neurons-mlp.json", tmp_path, other_versions))
    assert list(neurons.names) == expected["neurons"] and neurons.kind == "mlp"


def test_files_of_mib() -> None:
    graph = EdgeGraph.from_model(cases.load(cases.SIIT)[0])
    circuit = Circuit.from_mib(DATA / "mib-circuit.json", graph)
    assert list(circuit.edges) == expected["results"]["circuit"]
    scores = EdgeScores.from_mib(DATA / "mib-scores.json", graph)
    torch.testing.assert_close(scores.tensor, tensors["scores"], rtol=0, atol=0)


# ------------------------------------------------------------------------------------ stopped runs


def fit(name: str, checkpoint: Path) -> PruneResult:
    model, task = cases.load(cases.PRUNERS[name][0])
    return cases.pruner(name, checkpoint).fit(model, task)


def check_run(name: str, result: PruneResult) -> None:
    wanted, saved = expected["pruners"][name], expected["pruners"][name]["saved"]
    assert result.finished and result.history[: len(saved)] == saved  # seconds too: not run anew
    check_computed([entry["loss"] for entry in result.history], wanted["losses"])
    check_computed(result.log_alpha, tensors[f"{name}/log_alpha"])
    if f"{name}/neurons" in tensors:
        check_computed(result.neuron_log_alpha, tensors[f"{name}/neurons"])
    if f"{name}/constants/z" in tensors:
        check_constants(result.constants, f"{name}/constants")


@goes_on
@pytest.mark.parametrize("name", cases.PRUNERS)
def test_edge_pruners_checkpoints(name: str, tmp_path: Path) -> None:
    checkpoint = copied(f"checkpoints/{name}.safetensors", tmp_path)
    before = checkpoint.read_bytes()
    check_run(name, fit(name, checkpoint))
    assert checkpoint.read_bytes() != before
    earlier = load_file(DATA / "checkpoints" / checkpoint.name)
    shapes = {name: tensor.shape for name, tensor in load_file(checkpoint).items()}
    assert shapes == {name: tensor.shape for name, tensor in earlier.items()}


@goes_on
def test_an_edge_pruners_checkpoint_of_other_versions(tmp_path: Path) -> None:
    check_run("nodes", fit("nodes", copied("checkpoints/nodes.safetensors", tmp_path, other=True)))


@pytest.mark.parametrize("name", cases.PRUNERS)
def test_a_checkpoint_is_of_todays_settings(name: str) -> None:
    settings = json.loads(json.dumps(cases.pruner(name, None).settings()))
    assert settings == expected["pruners"][name]["settings"]


def search(name: str, checkpoint: Path) -> EdgeScores | Circuit:
    model, task = cases.load(cases.SIIT)
    if name == "elimination":
        return eliminate(model, task, cases.scores(), **cases.ELIMINATION, checkpoint=checkpoint)
    method, settings = cases.SEARCHES[name]
    return discover(model, task, method, **settings, checkpoint=checkpoint, progress=False)


def check_search(name: str, found: EdgeScores | Circuit) -> None:
    wanted = expected["searches"][name]
    if isinstance(found, Circuit):
        assert list(found.edges) == wanted["edges"]
    else:
        check_computed(found.tensor, tensors[f"{name}/scores"])
    check_computed(json.loads(json.dumps(found.metadata)), wanted["metadata"])


@goes_on
@pytest.mark.parametrize("name", [*cases.SEARCHES, "elimination"])
def test_searches_checkpoints(name: str, tmp_path: Path) -> None:
    check_search(name, search(name, copied(f"checkpoints/{name}.safetensors", tmp_path)))


@goes_on
@pytest.mark.parametrize("name", ["eap", "elimination", "ugs"])
def test_searches_checkpoints_of_other_versions(name: str, tmp_path: Path) -> None:
    path = copied(f"checkpoints/{name}.safetensors", tmp_path, other=True)
    check_search(name, search(name, path))


@goes_on
@pytest.mark.parametrize(
    "name, tensor",
    [("eap", "total"), ("exact", "scores"), ("acdc", "kept"), ("elimination", "gone")],
)
def test_a_search_goes_on_from_what_its_checkpoint_holds(
    name: str, tensor: str, tmp_path: Path
) -> None:
    """With another state in the file the result is another: the search does not start anew."""
    path = copied(f"checkpoints/{name}.safetensors", tmp_path)
    state = load_file(path)
    with safe_open(path, framework="pt") as file:
        note = file.metadata()
    own = state[f"tensor/{tensor}"]
    if tensor == "kept":
        own[(~own).nonzero().max()] = True  # an edge that is decided, so it stays
    else:
        own = own.flip(0) if tensor == "gone" else own + 1
    save_file(state | {f"tensor/{tensor}": own.contiguous()}, path, note)
    found, wanted = search(name, path), expected["searches"][name]
    if isinstance(found, Circuit):
        assert list(found.edges) != wanted["edges"]
    else:
        assert not torch.allclose(found.tensor, tensors[f"{name}/scores"])


# -------------------------------------------------------------------------------------- comparisons


def check_comparison(name: str, folder: Path) -> Comparison:
    found, wanted = cases.comparison(name, folder), expected[name]
    assert [list(circuit.edges) for circuit in found.circuits] == wanted["circuits"]
    check_computed([figures(row) for row in found.rows], [figures(r) for r in wanted["rows"]])
    for method, scores in found.scores.items():
        check_computed(scores.tensor, tensors[f"{name}/{method}"])
    return found


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """A row but for time and memory."""
    return {name: value for name, value in row.items() if name not in ("seconds", "peak_mb")}


@goes_on
def test_a_comparison_that_ended_is_read(tmp_path: Path, other_versions: bool) -> None:
    folder = copied("compare", tmp_path, other_versions)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = check_comparison("compare", folder)
    assert list(found.rows) == expected["compare"]["rows"]  # seconds too: no method ran
    assert before.items() <= {p.name: p.read_bytes() for p in folder.iterdir()}.items()


@goes_on
def test_a_comparison_that_was_stopped_goes_on(tmp_path: Path) -> None:
    folder = copied("compare-stopped", tmp_path, other=True)
    before = {path.name: path.read_bytes() for path in folder.glob("eap.*")}
    check_comparison("compare-stopped", folder)
    assert before == {path.name: path.read_bytes() for path in folder.glob("eap.*")}
    assert not [*folder.glob("*.checkpoint")]


# -------------------------------------------------------------------------------------- run folders


def check_folder(name: str, folder: Path) -> None:
    """What is in a run's folder is what the run came to."""
    wanted = expected["commands"][name]
    if "circuit.json" in wanted:
        assert list(Circuit.load(folder / "circuit.json").edges) == wanted["circuit.json"]
        judged = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        check_computed(judged, wanted["evaluation.json"])
    if f"{name}/scores" in tensors:
        scores = EdgeScores.load(folder / "scores.safetensors")
        check_computed(scores.tensor, tensors[f"{name}/scores"])


@pytest.mark.parametrize("name", ["prune", "discover"])
def test_folders_of_runs_that_ended(
    name: str, tmp_path: Path, other_versions: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(f"commands/{name}", tmp_path, other_versions)
    check_folder(name, folder)
    circuit, page = str(folder / "circuit.json"), tmp_path / "page.html"
    ranked = ["--scores", str(folder / "scores.safetensors")]
    assert main(["show", circuit, "--out", str(page), *ranked]) == 0
    assert f"{page}: {len(Circuit.load(circuit))} of 110 edges" in capsys.readouterr().out
    assert main(["evaluate", circuit, "--json", "--device", "cpu"]) == 0
    judged = json.loads(capsys.readouterr().out)
    check_computed(judged, expected["commands"][name]["evaluation.json"])
    assert main(["resume", str(folder)]) == 1
    assert "holds a finished run" in capsys.readouterr().err


@goes_on
@pytest.mark.parametrize(
    "name, other_versions",
    [
        ("prune-stopped", False),
        ("prune-stopped", True),
        ("discover-stopped", False),
        ("compare-stopped", False),
    ],
)
def test_folders_of_runs_that_were_stopped(
    name: str, other_versions: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(f"commands/{name}", tmp_path, other_versions)
    assert main(["resume", str(folder), "--no-progress"]) == 0
    assert ("The run began with torch 2.6," in capsys.readouterr().err) or not other_versions
    check_folder(name, folder)
    if name == "compare-stopped":
        import pandas

        table, own = pandas.read_csv(folder / "table.csv"), expected["commands"][name]["table.csv"]
        check_computed(table[list(own)].to_dict("list"), own)


def test_a_circuit_without_its_run_is_judged_under_given_constants(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = ["--model", cases.SIIT, "--task", cases.SIIT, "--pairs", str(cases.N_PAIRS)]
    constants = ["--ablation", str(DATA / "constants.safetensors")]
    circuit = str(DATA / "circuit.json")
    assert main(["evaluate", circuit, *pairs, *constants, "--json", "--device", "cpu"]) == 0
    judged = json.loads(capsys.readouterr().out)
    check_computed(judged, expected["results"]["figures"]["constants"])


# ----------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", expected["settings"])
def test_settings_are_told_as_before(name: str) -> None:
    settings = json.loads(json.dumps(cases.pruners()[name].settings()))
    assert settings == expected["settings"][name]
