"""Discovery methods side by side: one model, one task, one evaluator.

1. Every method is asked up front whether it can do the task with its settings: it runs on a task
   of one pair that ends at the first batch, so that what it refuses, it refuses before any work.
2. A method's run gives scores, from which circuits of every size are taken, or a circuit (ACDC).
   Its wall time and its peak memory are measured.
3. All circuits are evaluated on held-out pairs.
4. With a folder, each run's scores, circuits and figures are written there as they are done, and a
   comparison that was killed continues from them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from tl_edgeprune.ablation.kinds import check_ablation
from tl_edgeprune.circuits.circuit import Circuit, check_budget
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.evaluation.comparison import Comparison, Row, columns_of_measures
from tl_edgeprune.evaluation.comparison_folder import Folder, Run
from tl_edgeprune.evaluation.evaluate import Evaluation, evaluate_all
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods import registry
from tl_edgeprune.methods.registry import Found
from tl_edgeprune.runs.task_checks import check_tokens
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.tasks.task import Task, prompts_differ
from tl_edgeprune.utils.locks import locked_folder
from tl_edgeprune.utils.profiling import Cost, measure_cost
from tl_edgeprune.utils.suggest import did_you_mean

METHODS = ("edge-pruning", "eap", "eap-ig", "mask-ig", "random")
EDGE_PRUNING = "edge-pruning"


def compare(
    model: Any,
    train: Task,
    held_out: Task,
    methods: Sequence[str] = METHODS,
    sizes: Sequence[int] = (),
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    absolute: bool = True,
    alive: bool = False,
    ablation: str = "counterfactual",
    batch_size: int = 16,
) -> Comparison:
    """Find circuits by several methods and evaluate all of them on held-out pairs.

    Args:
        train, held_out: what the methods see, and what their circuits are judged on.
        methods: names that `discover` knows.
        sizes: edges of the circuits that are taken from each method's scores. A method that gives
            a circuit (ACDC) has one row, at its own size.
        settings: of a method, by its name. A list for "threshold" gives a run for each. Edge
            Pruning makes one run under sampled budgets for all sizes, or, with "per_size": True,
            a run of its own for every size, which finds better circuits and costs as much each.
        seed: for every method that draws, unless its settings say otherwise.
        path: a folder for what is found. A comparison with the same data, settings and sizes goes
            on from what is there; methods can be added.
        progress: show progress bars.
        absolute: take attribution's scores by magnitude (learned rankings are taken as they are).
        alive: take dead edges out of each circuit; it then has at most the size asked for.
        ablation: what removed edges carry, for every method and for the evaluation.
        batch_size: of the evaluation.

    Raises ValueError, TypeError or NotImplementedError before any long work: unknown methods,
    sizes outside the graph, methods that cannot do the task with their settings; a folder that
    holds another comparison; BlockingIOError where another process works in it. Ctrl-C stops it;
    what is finished stays in the folder.
    """
    settings = settings or {}
    plan = _Plan(train, held_out, tuple(sizes), seed, absolute, alive, ablation, batch_size)
    runs = [run for name in methods for run in _runs(name, settings.get(name, {}), plan)]
    _check(model, plan, methods, settings, runs)
    folder = _folder(path, model, plan)
    outcomes: list[_Done] = []
    with nullcontext() if folder is None else locked_folder(folder.path):
        if folder is not None:
            folder.check(runs)
        bar = tqdm(runs, "comparing", disable=not progress)
        for run in bar:
            bar.set_postfix_str(run.name)
            outcomes.append(_do(model, run, plan, folder, progress))
    return _comparison(outcomes, plan)


# ----------------------------------------------------------------------------------------- the plan


class _Plan(NamedTuple):
    """What all runs share."""

    train: Task
    held_out: Task
    sizes: tuple[int, ...]
    seed: int
    absolute: bool
    alive: bool
    ablation: str
    batch_size: int


class _Done(NamedTuple):
    """A run with what it found."""

    run: Run
    found: Found
    cost: Cost
    circuits: list[Circuit]
    figures: list[Evaluation]


def _runs(method: str, settings: Mapping[str, Any], plan: _Plan) -> list[Run]:
    """A method's runs: one, or one for each size or threshold."""
    run_settings = dict(settings)
    if method == EDGE_PRUNING and run_settings.pop("per_size", False):
        return [
            Run(f"{method}.{k}", method, run_settings | {"n_edges": k}, (k,)) for k in plan.sizes
        ]
    thresholds = run_settings.get("threshold")
    if isinstance(thresholds, list | tuple):
        return [
            Run(f"{method}.{t}", method, run_settings | {"threshold": t}, plan.sizes)
            for t in thresholds
        ]
    return [Run(method, method, run_settings, plan.sizes)]


def _check(
    model: Any,
    plan: _Plan,
    methods: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    runs: list[Run],
) -> None:
    """Raise for all that can be known to fail before any long work."""
    _check_names(methods, settings, runs)
    check_ablation(plan.ablation)
    graph = EdgeGraph.from_model(model)
    for size in plan.sizes:
        check_budget(size, graph)
    if len(set(plan.sizes)) < len(plan.sizes):
        raise ValueError(f"compare: a size is given twice: {list(plan.sizes)}.")
    wanting = [name for name in methods if not registry.METHODS[name].gives_circuit]
    if wanting and not plan.sizes:
        raise ValueError(
            f"compare: {', '.join(wanting)} rank all edges, and there are no sizes to take "
            "circuits of: give compare(…, sizes=[…])."
        )
    for task in (plan.train, plan.held_out):
        check_tokens(task, model)
    for run in runs:
        _rehearse(model, run, plan)


def _check_names(
    methods: Sequence[str], settings: Mapping[str, Mapping[str, Any]], runs: list[Run]
) -> None:
    known = ", ".join(registry.METHODS)
    if not methods:
        raise ValueError(f"compare: no methods given: expected some of {known}.")
    unknown = [name for name in methods if name not in registry.METHODS]
    if unknown:
        raise ValueError(
            f"compare: unknown methods {', '.join(map(repr, unknown))}: expected some of {known}."
            f"{did_you_mean(unknown[0], registry.METHODS)}"
        )
    names = [run.name for run in runs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"compare: {', '.join(repeated)} would run twice: give each method once.")
    for name, of_method in settings.items():
        if name not in methods:
            raise ValueError(
                f"compare: settings for {name!r}, which is not among the methods "
                f"({', '.join(methods)})."
            )
        if "threshold" in of_method and not registry.METHODS[name].gives_circuit:
            raise ValueError(
                f"compare: a threshold in the settings of {name!r}, which ranks all edges. "
                "Thresholds are for acdc; how many edges to take of a ranking is compare(…, "
                "sizes=[…])."
            )
        if of_method.get("threshold") in ([], ()):
            raise ValueError(
                f"compare: no threshold in the settings of {name!r}: expected a number, or a list "
                "of one or more, for a run each."
            )
        if of_method.get("positions") is not None:
            raise ValueError(
                f"compare: positions in the settings of {name!r}. Circuits whose edges have masks "
                "in spans count other edges than those without: evaluate them apart."
            )
        if "ablation" in of_method:
            raise ValueError(
                f"compare: an ablation in the settings of {name!r}. Figures under different "
                "ablations do not compare: give compare(…, ablation=…) for all."
            )


class _Reached(Exception):
    """A method has come to its first batch."""


class _Rehearsal(Task):
    """A task that ends at the first batch: what a method checks before, it has checked."""

    def batches(self, size: int, shuffle: bool = False, seed: int = 0) -> Iterator[Batch]:
        raise _Reached


def _rehearse(model: Any, run: Run, plan: _Plan) -> None:
    """Raise what the method raises before it starts."""
    informative = (at for at in range(len(plan.train)) if prompts_differ(plan.train[at : at + 1]))
    first = plan.train.subset([next(informative, 0)])
    task = _Rehearsal(**{f.name: getattr(first, f.name) for f in fields(first)})
    arguments = _arguments(run, plan, False)
    for name in ("checkpoint", "resume"):  # of the pairs themselves
        arguments.pop(name, None)
    try:
        registry.discover(model, task, run.method, **arguments)
    except _Reached:
        pass
    except (ValueError, TypeError, NotImplementedError) as error:
        raise type(error)(f"compare: method {run.method!r}: {error}") from error


def _arguments(run: Run, plan: _Plan, progress: bool) -> dict[str, Any]:
    """Settings of a call of `discover`: the run's own, and what all runs share."""
    setting_names = registry.find_method(run.method).parameters
    shared = {"ablation": plan.ablation, "seed": plan.seed, "progress": progress}
    return {name: value for name, value in shared.items() if name in setting_names} | run.settings


def _folder(path: str | os.PathLike[str] | None, model: Any, plan: _Plan) -> Folder | None:
    """The folder of this comparison; ValueError where it is a file."""
    if path is None:
        return None
    shared = plan._asdict() | {"sizes": list(plan.sizes)}
    del shared["batch_size"]  # of no consequence for the figures
    return Folder(Path(path), model, **shared)


# ------------------------------------------------------------------------------------------ one run


def _do(model: Any, run: Run, plan: _Plan, folder: Folder | None, progress: bool) -> _Done:
    """A run from the folder as far as it is there, and made where it is not."""
    saved = folder.read(run) if folder is not None else None
    result, cost, figures = saved if saved is not None else (None, None, None)
    if result is None or cost is None:
        result, cost = _discover(model, run, plan, folder, progress)
    circuits = _circuits(result, run, plan)
    if figures is None:
        figures = evaluate_all(
            model, circuits, plan.held_out, ablation=plan.ablation, batch_size=plan.batch_size
        )
        if folder is not None:
            folder.write(run, result, cost, figures)
    return _Done(run, result, cost, circuits, figures)


def _discover(
    model: Any, run: Run, plan: _Plan, folder: Folder | None, progress: bool
) -> tuple[Found, Cost]:
    arguments, seconds_before = _arguments(run, plan, progress), 0.0
    if folder is not None:
        seconds_before = folder.begin(run)
        file = folder.file(run, "checkpoint")
        arguments = registry.find_method(run.method).with_checkpoint(file, arguments)
    device = arguments.get("device") or next(iter(model.parameters())).device
    with measure_cost(device) as cost:
        result = registry.discover(model, plan.train, run.method, **arguments)
    if not result.metadata.get("finished", True):  # Edge Pruning keeps what Ctrl-C left it
        raise KeyboardInterrupt
    cost.seconds += seconds_before
    if folder is not None:
        folder.write(run, result, cost, None)
    return result, cost


def _circuits(found: Found, run: Run, plan: _Plan) -> list[Circuit]:
    if isinstance(found, Circuit):
        return [found.without_dead_edges() if plan.alive else found]
    absolute = plan.absolute if found.by_magnitude else None
    return [found.top(size, absolute=absolute, alive=plan.alive) for size in run.sizes]


def _comparison(done: list[_Done], plan: _Plan) -> Comparison:
    rows: list[Row] = []
    circuits: list[Circuit] = []
    for run, result, cost, circuits_of_run, figures in done:
        sizes = [None] if isinstance(result, Circuit) else run.sizes
        for size, circuit, evaluation in zip(sizes, circuits_of_run, figures, strict=True):
            row = {"method": run.method, "size": size, "threshold": run.settings.get("threshold")}
            measured = evaluation.to_dict()
            names = ("n_edges", "n_alive", *columns_of_measures())
            row |= {name: measured.get(name) for name in names}
            rows.append(row | {"seconds": cost.seconds, "peak_mb": cost.peak_mb})
            circuits.append(circuit)
    scores = {d.run.name: d.found for d in done if isinstance(d.found, EdgeScores)}
    measure = "mse" if plan.train.objective == "mse" else "kl"
    title = f"{plan.held_out.name}, {len(plan.held_out)} held-out pairs"
    return Comparison(tuple(rows), tuple(circuits), scores, measure, title)
