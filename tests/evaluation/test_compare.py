"""Comparisons: figures are `evaluate`'s, refusals come first, a killed one goes on."""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import model_zoo

from tl_edgeprune import Circuit, Comparison, EdgePruner, compare, discover, evaluate, models, tasks
from tl_edgeprune.evaluation.comparison import column_formats
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods import registry
from tl_edgeprune.objectives import kl
from tl_edgeprune.report import plot_comparison
from tl_edgeprune.report.plots.axes import round_ticks
from tl_edgeprune.report.plots.comparison import _floor
from tl_edgeprune.runs import resume as saved
from tl_edgeprune.utils import profiling as measuring
from tl_edgeprune.utils.profiling import measure_cost

COLUMNS = tuple(column_formats())
SIZES = (5, 12)
QUICK = {"edge-pruning": {"steps": 4, "batch_size": 4}}


@pytest.fixture(scope="module")
def model() -> Any:
    return model_zoo.load("bridge-gpt2")


@pytest.fixture(scope="module")
def data(model: Any) -> tuple[Any, Any]:
    return model_zoo.pairs(model, 6).split(0.5)


def run(model: Any, data: Any, methods: Any, sizes: Any = SIZES, **settings: Any) -> Comparison:
    return compare(model, *data, methods, sizes, **({"progress": False} | settings))


def one_circuit(model: Any, task: Any, *, threshold: float = 0.1, **settings: Any) -> Circuit:
    """A method that chooses the size itself, as ACDC does."""
    graph = EdgeGraph.from_model(model)
    next(iter(task.batches(2)))
    n_edges = round(threshold * graph.n_edges)
    edges = torch.arange(graph.n_edges).flip(0).float()
    return Circuit.top(graph, edges, n_edges, method="acdc", threshold=threshold)


@pytest.fixture
def acdc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.METHODS["acdc"], "function", one_circuit)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that have run for the whole task, in order."""
    made: list[str] = []
    original = registry.discover

    def counted(model: Any, task: Any, method: str, **settings: Any) -> Any:
        found = original(model, task, method, **settings)
        if len(task) > 1:
            made.append(method)
        return found

    monkeypatch.setattr(registry, "discover", counted)
    return made


def interrupt(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    original = registry.METHODS[method].function

    @functools.wraps(original)
    def interrupted(model: Any, task: Any, **settings: Any) -> Any:
        if len(task) > 1:
            raise KeyboardInterrupt
        return original(model, task, **settings)

    monkeypatch.setattr(registry.METHODS[method], "function", interrupted)


# ----------------------------------------------------------------------------------------- figures


def test_figures_are_those_of_discover_and_evaluate(model, data):
    train, held_out = data
    settings = QUICK | {"eap-ig": {"steps": 2}}
    found = run(model, data, ["edge-pruning", "eap-ig", "random"], settings=settings, seed=3)
    expected = [
        *_rows(model, data, "edge-pruning", seed=3, progress=False, **QUICK["edge-pruning"]),
        *_rows(model, data, "eap-ig", steps=2),
        *_rows(model, data, "random", seed=3),
    ]
    assert len(found.rows) == len(expected) == len(found.circuits) == 6
    for row, circuit, (method, size, wanted) in zip(
        found.rows, found.circuits, expected, strict=True
    ):
        assert (row["method"], row["size"]) == (method, size) and circuit == wanted
        figures = evaluate(model, wanted, held_out).to_dict()
        for name in COLUMNS[3:-2]:
            assert row[name] == (None if figures[name] is None else pytest.approx(figures[name]))
        assert row["seconds"] > 0 and row["peak_mb"] >= 0
    assert set(found.scores) == {"edge-pruning", "eap-ig", "random"}
    assert found.measure == "kl" and len(train) != 0


def _rows(model: Any, data: Any, method: str, **settings: Any) -> list[tuple[str, int, Circuit]]:
    scores = discover(model, data[0], method=method, **settings)
    return [(method, size, scores.top(size)) for size in SIZES]


def test_the_table_is_tidy(model, data, acdc):
    table = run(model, data, ["eap", "acdc"]).table
    assert tuple(table.columns) == COLUMNS
    assert table["method"].tolist() == ["eap", "eap", "acdc"]
    assert table["size"].isna().tolist() == [False, False, True]
    assert table["size"].dropna().tolist() == list(SIZES)
    assert all(table[name].dtype == float for name in ("kl", "logit_diff", "peak_mb"))
    assert table["n_edges"].dtype == int


def test_signed_alive_and_ablation_reach_methods_and_evaluation(model, data):
    found = run(model, data, ["mask-ig"], absolute=False, alive=True, ablation="zero")
    scores = discover(model, data[0], method="mask-ig", ablation="zero")
    for row, circuit in zip(found.rows, found.circuits, strict=True):
        wanted = scores.top(row["size"], absolute=False, alive=True)
        assert circuit == wanted and row["n_edges"] == row["n_alive"] == wanted.n_edges
        assert row["kl"] == pytest.approx(evaluate(model, wanted, data[1], ablation="zero").kl)


def test_a_method_that_gives_a_circuit_has_one_row_a_threshold(model, data, acdc):
    n_edges = EdgeGraph.from_model(model).n_edges
    found = run(model, data, ["acdc"], (), settings={"acdc": {"threshold": [0.1, 0.5]}})
    assert [row["n_edges"] for row in found.rows] == [round(t * n_edges) for t in (0.1, 0.5)]
    assert [row["size"] for row in found.rows] == [None, None] and not found.scores
    assert found.rows[0]["kl"] == pytest.approx(evaluate(model, found.circuits[0], data[1]).kl)


def test_thresholds_are_told_wherever_their_circuits_are(model, data, acdc, tmp_path):
    settings = {"acdc": {"threshold": [0.01, 0.5]}}
    found = run(model, data, ["acdc", "random"], (7,), settings=settings)
    assert [row["threshold"] for row in found.rows] == [0.01, 0.5, None]
    assert found.table["threshold"].tolist()[:2] == [0.01, 0.5]
    words = repr(found).splitlines()[1].split()
    assert words[:4] == ["method", "size", "threshold", "n_edges"]
    shown = [line.split() for line in repr(found).splitlines()[2:]]
    assert [line[1] for line in shown] == ["0.01", "0.5", "7"]
    found.plot(tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text("utf-8")
    for row in found.rows[:2]:
        assert f"{row['threshold']}: {row['n_edges']:,} edges" in text


def test_edge_pruning_can_run_anew_for_each_size(model, data):
    settings = {"edge-pruning": QUICK["edge-pruning"] | {"per_size": True}}
    found = run(model, data, ["edge-pruning"], settings=settings, seed=1)
    for size, circuit in zip(SIZES, found.circuits, strict=True):
        pruner = EdgePruner(size, seed=1, progress=False, **QUICK["edge-pruning"])
        assert circuit == pruner.fit(model, data[0]).circuit
    assert found.rows[0]["seconds"] != found.rows[1]["seconds"]


def test_a_task_of_numbers_is_measured_by_squared_error(tmp_path):
    program = models.load("tracr-xproportion", device="cpu")
    data = tasks.load("tracr-xproportion", program, 24).split(0.5)
    found = run(program, data, ["mask-ig", "random"], [5, 10], ablation="zero")
    assert found.measure == "mse"
    assert found.table["logit_diff"].isna().all() and found.table["faithfulness"].notna().all()
    found.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("methods", "sizes", "settings", "message"),
    [
        (["eap", "eap-gi"], SIZES, {}, "unknown methods 'eap-gi': expected some of acdc"),
        ([], SIZES, {}, "no methods given"),
        (["eap", "eap"], SIZES, {}, "eap would run twice"),
        (["eap"], (), {}, r"eap rank all edges.*give compare\(…, sizes=\[…\]\)"),
        (["eap"], (0,), {}, "n_edges=0: expected a whole number from 1"),
        (["eap"], (5, 10**6), {}, "n_edges=1000000: expected a whole number from 1"),
        (["eap"], (5, 5), {}, "a size is given twice"),
        (["eap"], SIZES, {"ugs": {}}, "settings for 'ugs', which is not among the methods"),
        (["eap"], SIZES, {"eap": {"ablation": "zero"}}, "give compare(…, ablation=…) for all"),
        (["eap-ig"], SIZES, {"eap-ig": {"steps": 0}}, "method 'eap-ig': steps=0"),
        (["edge-pruning"], SIZES, {"edge-pruning": {"lr": -1.0}}, "method 'edge-pruning': lr=-1.0"),
        (["eap"], SIZES, {"eap": {"objective": "kl"}}, "'eap': objective 'kl' is smallest at"),
    ],
)
def test_what_cannot_work_is_refused_before_any_run(
    model, data, calls, methods, sizes, settings, message
):
    with pytest.raises(ValueError, match=message if "\\" in message else re.escape(message)):
        run(model, data, ["random", *methods] if methods else [], sizes, settings=settings)
    assert calls == []


def test_an_unknown_setting_is_refused_with_its_method(model, data, calls):
    with pytest.raises(ValueError, match="compare: method 'eap': eap takes no stepz: expected"):
        run(model, data, ["mask-ig", "eap"], settings={"eap": {"stepz": 3}})
    assert calls == []


def test_a_task_that_a_method_cannot_do_is_refused_first(calls):
    program = models.load("tracr-reverse", device="cpu")
    data = tasks.load("tracr-reverse", program, 12).split(0.5)
    with pytest.raises(ValueError, match="method 'eap': objective 'mse' is smallest at the full"):
        run(program, data, ["mask-ig", "eap"])
    assert calls == []


def test_refusals_leave_the_model_as_it_was(model, data):
    before = model(data[0].clean[0][None])
    with pytest.raises(ValueError):
        run(model, data, ["eap-ig"], settings={"eap-ig": {"objective": "none"}})
    assert torch.equal(model(data[0].clean[0][None]), before)


# -------------------------------------------------------------------------------------- the folder


def figures(found: Comparison) -> list[dict[str, Any]]:
    skip = ("seconds", "peak_mb")
    return [{k: v for k, v in row.items() if k not in skip} for row in found.rows]


def test_a_killed_comparison_goes_on(model, data, acdc, calls, tmp_path, monkeypatch):
    methods = ["eap", "acdc", "mask-ig", "random"]
    whole = run(model, data, methods)
    calls.clear()
    with monkeypatch.context() as patch:
        interrupt(patch, "mask-ig")
        with pytest.raises(KeyboardInterrupt):
            run(model, data, methods, path=tmp_path / "new" / "folder")
    assert calls == ["eap", "acdc"]
    folder = tmp_path / "new" / "folder"
    assert {p.name for p in folder.iterdir() if p.suffix != ".lock"} - {".lock"} == {
        *("eap.json", "eap.safetensors", "acdc.json", "acdc.circuit.json", "mask-ig.json")
    }
    calls.clear()
    found = run(model, data, methods, path=folder)
    assert calls == ["mask-ig", "random"]
    assert figures(found) == figures(whole) and found.circuits == whole.circuits
    calls.clear()
    again = run(model, data, methods, path=folder)
    assert calls == [] and again.rows == found.rows and again.circuits == found.circuits


def test_a_comparison_killed_while_it_evaluates_keeps_the_scores(
    model, data, calls, tmp_path, monkeypatch
):
    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tl_edgeprune.evaluation.compare"], "evaluate_all", killed)
        with pytest.raises(KeyboardInterrupt):
            run(model, data, ["eap"], path=tmp_path)
    found = run(model, data, ["eap"], path=tmp_path)
    assert calls == ["eap"] and figures(found) == figures(run(model, data, ["eap"]))


def test_edge_pruning_goes_on_from_its_checkpoint(model, data, tmp_path, monkeypatch):
    settings = {"edge-pruning": {"steps": 6, "batch_size": 4, "checkpoint_every": 2}}
    original, steps = registry.METHODS["edge-pruning"].function, []

    def watched(model: Any, task: Any, **own: Any) -> Any:
        def objective(logits: Any, full: Any, batch: Any) -> Any:
            if len(task) > 1 and torch.is_grad_enabled():
                steps.append(1)
                if len(steps) == limit:
                    raise KeyboardInterrupt
            return kl(logits, full, batch)

        return original(model, task, **own | {"objective": objective, "init_scores": None})

    monkeypatch.setattr(registry.METHODS["edge-pruning"], "function", watched)
    limit = 10**6
    whole = run(model, data, ["edge-pruning"], settings=settings)
    assert len(steps) == 6
    limit = len(steps) + 4  # in the fourth step: Edge Pruning itself keeps what it has
    with pytest.raises(KeyboardInterrupt):
        run(model, data, ["edge-pruning"], settings=settings, path=tmp_path)
    locks = {".lock", ".edge-pruning.checkpoint.lock"}
    assert {p.name for p in tmp_path.iterdir()} - locks == {
        *("edge-pruning.json", "edge-pruning.checkpoint")
    }
    limit, before = 10**6, len(steps)
    found = run(model, data, ["edge-pruning"], settings=settings, path=tmp_path)
    assert len(steps) - before == 3  # steps 4 to 6
    assert figures(found) == figures(whole) and found.circuits == whole.circuits
    assert not (tmp_path / "edge-pruning.checkpoint").exists()


def test_time_before_the_kill_counts_and_a_checkpoint_without_a_note_does_not(
    model, data, tmp_path, monkeypatch
):
    """A method that saves its state by itself, as ACDC does."""
    given: list[bool] = []

    def saves(model: Any, task: Any, *, checkpoint: Any = None, **settings: Any) -> Circuit:
        if len(task) > 1:
            given.append(checkpoint.is_file())
            time.sleep(0.2)
            checkpoint.write_text("state")
            if len(given) == 1:
                raise KeyboardInterrupt
        return one_circuit(model, task, **settings)

    monkeypatch.setattr(registry.METHODS["acdc"], "function", saves)
    with pytest.raises(KeyboardInterrupt):
        run(model, data, ["acdc"], (), path=tmp_path)
    found = run(model, data, ["acdc"], (), path=tmp_path)
    assert given == [False, True] and found.rows[0]["seconds"] >= 0.39
    assert not (tmp_path / "acdc.checkpoint").exists()
    (tmp_path / "acdc.json").unlink()
    (tmp_path / "acdc.checkpoint").write_text("of another run")
    run(model, data, ["acdc"], (), path=tmp_path)
    assert given == [False, True, False]


@pytest.fixture(scope="module")
def finished(model: Any, data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mask-IG in it, which no test changes."""
    folder = tmp_path_factory.mktemp("finished")
    run(model, data, ["mask-ig"], path=folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "its seed is 0, here it is 1"),
        ({"sizes": (5, 13)}, r"its sizes is \[5, 12\], here it is \[5, 13\]"),
        ({"absolute": False}, "its absolute is True, here it is False"),
        ({"alive": True}, "its alive is False"),
        ({"ablation": "zero"}, "its ablation is 'counterfactual'"),
        ({"settings": {"mask-ig": {"steps": 2}}}, "its settings is {}, here it is {'steps': 2}"),
        ("train", "its train is '"),
        ("held_out", "its held_out is '"),
        ("model", "its model is '"),
    ],
)
def test_a_folder_of_another_comparison_is_refused(model, data, calls, finished, changes, message):
    train, held_out = data
    if changes == "train":
        data, changes = (train[1:], held_out), {}
    elif changes == "held_out":
        data, changes = (train, train), {}
    elif changes == "model":
        model, changes = model_zoo.build("bridge-gpt2"), {}
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match=f"mask-ig.json is of another comparison: {message}"):
        run(model, data, ["random", "mask-ig"], path=finished, **changes)
    assert calls == []


def test_methods_can_be_added_to_a_folder(model, data, calls, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    found = run(model, data, ["random", "mask-ig"], path=tmp_path)
    assert calls == ["random"]
    assert [row["method"] for row in found.rows] == ["random"] * 2 + ["mask-ig"] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "or a damaged one: not valid JSON"),
        ("[]", "is no result of compare"),
        ('{"kind": "another"}', "is no result of compare"),
        ('{"kind": "tl_edgeprune comparison", "identity": {}}', "is no result of compare"),
    ],
)
def test_a_damaged_folder_is_refused(model, data, calls, tmp_path, content, message):
    (tmp_path / "random.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(model, data, ["eap", "random"], path=tmp_path)
    (tmp_path / "random.json").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        run(model, data, ["random"], path=tmp_path / "file")
    assert calls == []


def test_notes_say_what_made_them(model, data, tmp_path):
    run(model, data, ["random"], path=tmp_path)
    note = json.loads((tmp_path / "random.json").read_text())
    assert note["identity"]["format"] == 1 and note["identity"]["method"] == "random"
    assert {"tl_edgeprune", "transformer-lens", "torch"} <= set(note["versions"])


# -------------------------------------------------------------------------------- text and pictures


def made(**changes: Any) -> Comparison:
    row = dict.fromkeys(COLUMNS) | {"n_edges": 1200, "n_alive": 1000, "kl": 0.5, "mse": 2.0}
    row |= {"exact_match": 0.25, "seconds": 61.0, "faithfulness": 0.5}
    rows = [{"method": "eap", "size": 1200}, {"method": "acdc"}]
    return Comparison(tuple(row | own | changes for own in rows), (), title="ioi, 8 pairs")


def test_a_comparison_reads_as_a_table():
    lines = repr(made()).splitlines()
    assert lines[0] == "Comparison(ioi, 8 pairs)" and str(made()) == repr(made())
    assert lines[1].split() == [
        *("method", "size", "n_edges", "n_alive", "kl", "mse", "faithfulness"),
        *("exact_match", "seconds"),
    ]
    assert lines[2].split() == "eap 1,200 1,200 1,000 0.5 2 0.50 25.0% 61.0".split()
    assert lines[3].split() == "acdc 1,200 1,000 0.5 2 0.50 25.0% 61.0".split()
    assert len({len(line) for line in lines[1:]}) == 1


@pytest.mark.parametrize("value", [0.0, 1e-9, 3.0])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_any_table_can_be_drawn(tmp_path, value, ending):
    made(kl=value, faithfulness=None).plot(tmp_path / f"figure.{ending}", title="A & <b>")
    assert (tmp_path / f"figure.{ending}").stat().st_size > 5_000


def test_pictures_of_nothing_are_refused(tmp_path):
    table = made().table
    with pytest.raises(ValueError, match="has no column kl: pass Comparison.table"):
        plot_comparison(table.drop(columns="kl"), tmp_path / "figure.png")
    with pytest.raises(ValueError, match="has no rows"):
        plot_comparison(table[:0], tmp_path / "figure.png")
    with pytest.raises(ValueError, match="measure='acc': expected one of kl, mse"):
        plot_comparison(table, tmp_path / "figure.png", measure="acc")
    assert not list(tmp_path.iterdir())


def test_what_counts_as_zero_is_drawn_below_all_else():
    import pandas

    assert _floor(pandas.Series([1.0, 0.3, 1e-9, 0.0])) == pytest.approx(0.1)
    assert _floor(pandas.Series([1.0, 0.3])) == float("-inf")
    assert _floor(pandas.Series([0.0, 0.0])) == 1.0
    assert round_ticks([200.0, 10_000.0], 6) == [200, 500, 1000, 2000, 5000, 10_000]
    assert round_ticks([1e-4, 10.0], 7) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1, 10])
    assert round_ticks([0.0, float("nan")], 6) == []
    assert round_ticks([3.0, 5.0], 6) == [3, 5] and round_ticks([0.0, 0.2701], 7) == [0.27]


# -------------------------------------------------------------------------------------------- costs


def hold(megabytes: int, seconds: float = 0.1) -> None:
    memory = torch.ones(megabytes * 1_000_000, dtype=torch.uint8)
    time.sleep(seconds)
    del memory


def test_cost_is_the_blocks_own():
    big = torch.ones(30_000_000, dtype=torch.uint8)
    with measure_cost() as cost:
        hold(80)
    assert 0.1 <= cost.seconds < 20
    assert 75 <= cost.peak_mb < 110
    assert len(big)
    with measure_cost() as cost:
        pass
    assert cost.peak_mb < 20


def test_without_psutil_the_processs_record_is_used(monkeypatch):
    monkeypatch.setattr(measuring, "_process", lambda: None)
    with measure_cost() as cost:
        hold(1, 0)
    assert cost.peak_mb >= 0
    monkeypatch.setattr(measuring, "_recorded_peak", lambda: None)
    with measure_cost() as cost:
        hold(1, 0)
    assert cost.peak_mb is None and cost.seconds > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_cost_is_its_memory():
    with measure_cost("cuda") as cost:
        memory = torch.ones(50_000_000, dtype=torch.uint8, device="cuda")
        del memory
    assert 50 <= cost.peak_mb < 53


def test_benchmark_asks_for_help_only():
    """The full-size script is imported and parsed; running it takes an hour."""
    import importlib.util

    path = Path(__file__).parents[2] / "benchmarks" / "compare_smollm2.py"
    spec = importlib.util.spec_from_file_location("compare_smollm2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = module.parser().parse_args(["--pairs", "16", "--steps", "3"])
    assert options.pairs == 16 and set(module.settings(options)) <= set(module.METHODS)


def test_a_methods_own_checkpoint_is_for_the_run_alone(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "SAVE_SECONDS", 0.0)
    settings = {"eap": {"checkpoint": tmp_path / "eap.safetensors"}}
    first = run(model, data, ["eap"], settings=settings)
    assert (tmp_path / "eap.safetensors").is_file()
    assert figures(run(model, data, ["eap"], settings=settings)) == figures(first)
