"""`tl-edgeprune prune`: find a circuit by Edge Pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tl_edgeprune.commands import options
from tl_edgeprune.commands.inputs import HELD_OUT, Inputs
from tl_edgeprune.commands.run_folder import Run, check_free
from tl_edgeprune.commands.told import told


@told
def prune(
    model: options.Model,
    task: options.TaskName,
    n_edges: Annotated[int, typer.Option(help="Edges to keep.")],
    out: Annotated[Path, typer.Option(help="A new folder for what it writes.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 200,
    lr: Annotated[float, typer.Option(help="Learning rate of the edges' log alphas.")] = 0.3,
    batch_size: Annotated[int, typer.Option(help="Pairs of a forward.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Forwards of a step.")] = 1,
    pairs: options.Pairs = None,
    held_out: options.HeldOut = HELD_OUT,
    ablation: options.Ablation = "counterfactual",
    objective: options.Objective = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Run blocks again in backward: far less memory.")
    ] = False,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    seed: options.Seed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and run nothing.")
    ] = False,
    pos: Annotated[int, typer.Option(help="Tokens of a prompt, for the plan of --dry-run.")] = 64,
    as_json: options.Json = False,
) -> None:
    """Find a circuit of exactly --n-edges edges by Edge Pruning.

    It learns a mask on every edge of the model on some of the task's pairs and judges the circuit
    on the others. --out then holds settings.json, checkpoint.safetensors (every 25 steps; see
    resume), scores.safetensors, evaluation.json, history.png, circuit.html and circuit.json.

    Example: tl-edgeprune prune smollm2-135m ioi --n-edges 1000 --out runs/ioi

    On several GPUs: torchrun --nproc-per-node 2 -m tl_edgeprune prune smollm2-135m ioi
    --n-edges 1000 --out runs/ioi
    """
    from tl_edgeprune.commands.training import pruner_of, train

    inputs = Inputs(model, task, pairs, held_out, seed, dtype, device).resolved()
    settings = {
        "n_edges": n_edges,
        "steps": steps,
        "lr": lr,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "ablation": ablation,
        "objective": objective,
        "recompute": recompute,
    }
    _check_objective(objective)
    run = Run.new("prune", inputs, settings)
    pruner_of(run, out)
    check_free(out)
    if dry_run:
        _show_plan(run, out, pos, as_json)
    else:
        train(out, run, new=True, as_json=as_json)


def _check_objective(name: str | None) -> None:
    from tl_edgeprune.objectives import OBJECTIVES

    if name is not None and name not in OBJECTIVES:
        raise ValueError(
            f"--objective {name!r}: expected one of {', '.join(OBJECTIVES)}, or none for the "
            "task's own."
        )


def _show_plan(run: Run, out: Path, pos: int, as_json: bool) -> None:
    from tl_edgeprune.circuit import check_budget
    from tl_edgeprune.commands.shapes import planned_memory, shape_of

    shape = shape_of(run.inputs.model)
    if shape is not None:
        check_budget(run.settings["n_edges"], shape.graph)
    memory = None if shape is None else planned_memory(shape, run, pos)
    plan = {
        "model": run.inputs.model,
        "task": run.inputs.task,
        "edges": None if shape is None else shape.graph.n_edges,
        "n_edges": run.settings["n_edges"],
        "steps": run.settings["steps"],
        "pairs a step": run.settings["batch_size"] * run.settings["accumulate"],
        "device": run.inputs.device,
        "dtype": run.inputs.dtype,
        "out": str(out),
        "tokens a prompt": pos,
        "bytes with --recompute": memory,
    }
    if as_json:
        print(json.dumps(plan))
        return
    for name, value in plan.items():
        if name == "bytes with --recompute":
            continue
        shown = f"{value:,}" if isinstance(value, int) else value
        print(f"{name:18}{'known once it is loaded' if value is None else shown}")
    if memory is not None:
        print(f"\nMemory of a step with --recompute, prompts of {pos} tokens (--pos), MB:")
        for name, size in memory.items():
            print(f"  {name:16}{size / 1e6:12,.1f}")
    print("\nNothing was run.")
