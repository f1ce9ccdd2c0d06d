"""`tl-edgeprune prune`: find a circuit by Edge Pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tl_edgeprune.commands.common import options
from tl_edgeprune.commands.common.errors import with_error_messages
from tl_edgeprune.commands.common.inputs import HELD_OUT, Inputs
from tl_edgeprune.commands.common.pruner_options import given_settings, with_pruner_options
from tl_edgeprune.commands.common.run_folder import Run, check_free
from tl_edgeprune.commands.common.values import parse_assignments


@with_error_messages
@with_pruner_options(after="paper")
def prune(
    model: options.Model,
    task: options.TaskName,
    out: Annotated[Path, typer.Option(help="A new folder for the results.")],
    paper: Annotated[
        bool, typer.Option("--paper", help="Start from the published settings instead of ours.")
    ] = False,
    pairs: options.Pairs = None,
    held_out: options.HeldOut = HELD_OUT,
    task_set: options.TaskSet = None,
    cls: options.Class = "bridge",
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    seed: options.Seed = 0,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    dry_run: options.DryRun = False,
    pos: options.Pos = None,
    as_json: options.Json = False,
    **settings: Any,
) -> None:
    """Find a circuit of exactly --n-edges edges by Edge Pruning.

    It learns a mask on every edge of the model on some of the task's pairs and judges the circuit
    on the others. --out then holds settings.json, checkpoint.safetensors (every 25 steps; see
    resume), scores.safetensors, evaluation.json, history.png, circuit.html and circuit.json.

    Example: tl-edgeprune prune smollm2-135m ioi --n-edges 1000 --out runs/ioi

    The paper's settings, but fewer steps: tl-edgeprune prune gpt2 ioi --paper --n-edges 1000
    --steps 1000 --out runs/paper

    From a file: tl-edgeprune prune --config ioi.yaml --out runs/ioi

    On several GPUs: torchrun --nproc-per-node 2 -m tl_edgeprune prune smollm2-135m ioi
    --n-edges 1000 --out runs/ioi
    """
    task_options = parse_assignments("--task-set", task_set or [])
    inputs = Inputs(model, task, pairs, held_out, seed, dtype, device, cls, task_options).resolve()
    run = _run(inputs, given_settings(settings), paper)
    check_free(out, run)
    if dry_run:
        from tl_edgeprune.commands.jobs.dry_run import plan_of_prune, show_plan

        show_plan(plan_of_prune(run, pos) | {"out": str(out)}, as_json)
        return
    from tl_edgeprune.commands.jobs.prune import train

    train(out, run, new=True, as_json=as_json, progress=progress)


def _run(inputs: Inputs, given: dict[str, Any], paper: bool) -> Run:
    """The run with every setting resolved. Raises ValueError for settings that cannot work."""
    from tl_edgeprune.commands.jobs.prune import pruner_of
    from tl_edgeprune.commands.jobs.pruner_settings import resolve_settings
    from tl_edgeprune.training.controllers import ExactBudget

    _check_objective(given.get("objective"))
    settings = resolve_settings(given, paper=paper)
    if settings["init_scores"] == "none":
        settings["init_scores"] = None
    run = Run.new("prune", inputs, settings)
    pruner = pruner_of(run, Path())
    if pruner.n_edges is None and isinstance(pruner.controller, ExactBudget):
        raise ValueError(
            "--n-edges is missing: how many edges to keep. (A ranking of all edges: "
            "tl-edgeprune discover --method edge-pruning.)"
        )
    if isinstance(pruner.neuron_controller, ExactBudget) and pruner.n_neurons is None:
        raise ValueError("--n-neurons is missing: how many neurons to keep.")
    return run


def _check_objective(name: str | None) -> None:
    from tl_edgeprune.objectives import OBJECTIVES

    if name is not None and name not in OBJECTIVES:
        raise ValueError(
            f"--objective {name!r}: expected one of {', '.join(OBJECTIVES)}, or none for the "
            "task's own."
        )
