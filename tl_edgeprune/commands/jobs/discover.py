"""A search in a folder, by its settings: `discover` begins it, `resume` ends it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tl_edgeprune.circuits.circuit import check_budget
from tl_edgeprune.commands.common.run_folder import AGAIN, CHECKPOINT, SETTINGS, Run
from tl_edgeprune.commands.jobs.discover_files import circuit_of, evaluate_found, write
from tl_edgeprune.commands.jobs.method_settings import method_settings
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods.registry import discover, find_method
from tl_edgeprune.runs.task_checks import graph_at
from tl_edgeprune.tasks import Task
from tl_edgeprune.utils.locks import locked_folder
from tl_edgeprune.utils.reading import check_type, reporting_damage


def search_in(folder: Path, run: Run, *, new: bool, as_json: bool, progress: bool = True) -> None:
    """Begin the folder's search, or continue it, and write what it finds."""
    with nullcontext() if new else reporting_damage(folder / SETTINGS, AGAIN):
        run_settings, inputs = run.settings, run.inputs
        method, n_edges = check_type(run_settings["method"], str, "method"), run_settings["n_edges"]
        how = {name: run_settings[name] for name in ("absolute", "alive")}
        _check_kinds(n_edges, **how)
        settings = method_settings(method, check_type(run_settings["settings"], dict, "settings"))
    if "progress" in find_method(method).parameters:
        settings.setdefault("progress", progress and not as_json)
    checkpoint = folder / CHECKPOINT
    with locked_folder(folder), run.begun(folder, new=True) if new else nullcontext():
        try:
            loaded = inputs.load_model()
            found_on, judged_on = inputs.split(inputs.load_pairs(loaded))
            _check_size(loaded, found_on, n_edges, settings)
            settings = find_method(method).with_checkpoint(checkpoint, settings)
            result = discover(loaded, found_on, method, **settings)
            if not result.metadata.get("finished", True):  # Edge Pruning keeps what Ctrl-C left it
                raise KeyboardInterrupt
            circuit = circuit_of(result, n_edges, **how)
            figures = evaluate_found(loaded, circuit, judged_on, settings.get("ablation"))
        except KeyError as error:
            if "edges" not in settings:
                raise
            raise ValueError(f"--set edges: {error.args[0]}") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped. Go on with tl-edgeprune resume {folder}") from None
        files = write(folder, result, circuit, figures, settings.get("ablation"))
        checkpoint.unlink(missing_ok=True)
    if as_json:
        evaluation = None if figures is None else figures.to_dict()
        print(json.dumps({"out": str(folder), "evaluation": evaluation, "files": files}))
        return
    if figures is not None:
        print(f"On {figures.n_pairs} pairs that the circuit was not found on:\n\n{figures}\n")
    print(f"In {folder}/: {', '.join(files)}.")


def _check_size(model: Any, task: Task, n_edges: int | None, settings: dict[str, Any]) -> None:
    """Raise ValueError for more edges than there are, before the search."""
    if n_edges is None:
        return
    split = {n: settings[n] for n in ("split_qkv", "split_embeddings") if n in settings}
    graph = EdgeGraph.from_model(model, **split)
    check_budget(n_edges, graph_at(model, graph, task, settings.get("positions")) or graph)


def _check_kinds(n_edges: Any, absolute: Any, alive: Any) -> None:
    """Raise ValueError for values that `discover` does not write."""
    if n_edges is not None:
        check_type(n_edges, int, "n_edges")
    if absolute is not None:
        check_type(absolute, bool, "absolute")
    check_type(alive, bool, "alive")
