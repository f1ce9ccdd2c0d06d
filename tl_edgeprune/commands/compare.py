"""`tl-edgeprune compare`: several methods on one model, one task and one evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_edgeprune.commands.common import options
from tl_edgeprune.commands.common.errors import with_error_messages
from tl_edgeprune.commands.common.inputs import Inputs
from tl_edgeprune.commands.common.run_folder import Run
from tl_edgeprune.commands.common.values import parse_assignments, word

HALF = 0.5  # of the pairs is held out: what is judged is as large as what is found on
METHODS = ["edge-pruning", "eap", "eap-ig", "mask-ig", "random"]


@with_error_messages
def compare(
    model: options.Model,
    task: options.TaskName,
    out: Annotated[
        Path,
        typer.Option(help="A folder for the results. An unfinished comparison continues."),
    ],
    methods: Annotated[
        list[str], typer.Option(help="Names (tl-edgeprune methods), with commas or repeated.")
    ] = METHODS,
    sizes: Annotated[
        list[str] | None,
        typer.Option(help="Edges of the circuits to take, such as 200,500,1000."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A method's setting, METHOD.NAME=VALUE; may be repeated. acdc.threshold=[0.1,0.2] "
            "is a run each; edge-pruning.per_size=true a run for each size.",
        ),
    ] = None,
    absolute: options.Absolute = None,
    alive: options.Alive = False,
    ablation: Annotated[
        str, typer.Option(help="What removed edges carry: a name (tl-edgeprune ablations).")
    ] = "counterfactual",
    batch_size: options.BatchSize = 16,
    pairs: options.Pairs = None,
    held_out: options.HeldOut = HALF,
    task_set: options.TaskSet = None,
    cls: options.Class = "bridge",
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    seed: options.Seed = 0,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
    dry_run: options.DryRun = False,
    pos: options.Pos = None,
    as_json: options.Json = False,
) -> None:
    """Find circuits by several methods, and evaluate all on the same held-out pairs.

    --out then holds settings.json, each method's results, table.csv and comparison.png. If it is
    killed, the same command or resume continues it. Methods can be added by naming them too.

    Example: tl-edgeprune compare smollm2-135m ioi-t1 --methods edge-pruning,eap,eap-ig
    --sizes 200,1000 --out runs/compare

    With settings: tl-edgeprune compare smollm2-135m ioi-t1 --methods eap-ig,acdc --sizes 200,1000
    --set eap-ig.steps=10 --set acdc.threshold=[0.01,0.1] --out runs/compare
    """
    from tl_edgeprune.ablation.kinds import check_ablation
    from tl_edgeprune.commands.jobs.compare import check_same, compare_in
    from tl_edgeprune.commands.jobs.method_settings import compared_settings, runs_settings

    names = _listed(methods)
    settings_of = runs_settings(names, parse_assignments("--set", setting or []))
    for name in names:
        compared_settings(name, settings_of.get(name, {}))
    check_ablation(ablation)
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: expected 1 or more.")
    task_options = parse_assignments("--task-set", task_set or [])
    inputs = Inputs(model, task, pairs, held_out, seed, dtype, device, cls, task_options).resolve()
    sizes_of_circuits = _sizes(sizes or [])
    if not sizes_of_circuits:
        _check_no_ranking(names)
    settings = {
        "methods": names,
        "sizes": sizes_of_circuits,
        "settings": settings_of,
        "absolute": absolute is not False,
        "alive": alive,
        "ablation": ablation,
        "batch_size": batch_size,
    }
    run = Run.new("compare", inputs, settings)
    check_same(out, run)
    if dry_run:
        from tl_edgeprune.commands.jobs.dry_run import plan_of_discover, show_plan

        runs = {name: settings_of.get(name, {}) for name in names}
        plan = plan_of_discover(inputs, runs, sizes_of_circuits, pos)
        show_plan(plan | {"out": str(out)}, as_json)
        return
    compare_in(out, run, as_json=as_json, progress=progress)


def _check_no_ranking(methods: list[str]) -> None:
    """Raise ValueError for methods that rank all edges, since no sizes are given."""
    from tl_edgeprune.methods.registry import find_method

    ranking = [name for name in methods if not find_method(name).gives_circuit]
    if ranking:
        raise ValueError(
            f"--sizes is missing: {', '.join(ranking)} rank all edges, so say how many to take, "
            "such as --sizes 200,1000."
        )


def _listed(given: list[str]) -> list[str]:
    return [name.strip() for text in given for name in text.split(",") if name.strip()]


def _sizes(given: list[str]) -> list[int]:
    sizes = [word(text) for text in _listed(given)]
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"--sizes {size}: expected whole numbers of 1 or more.")
    return sizes
