"""`tl-edgeprune prune`: find a circuit by Edge Pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tl_edgeprune.commands.common import options
from tl_edgeprune.commands.common.errors import told
from tl_edgeprune.commands.common.inputs import HELD_OUT, Inputs
from tl_edgeprune.commands.common.run_folder import Run, check_free
from tl_edgeprune.commands.common.values import parsed, whole_path


@told
def prune(
    model: options.Model,
    task: options.TaskName,
    out: Annotated[Path, typer.Option(help="A new folder for what it writes.")],
    n_edges: Annotated[
        int | None,
        typer.Option(help="Edges to keep; may be left out where the controller has an aim."),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Start from the published settings, not from ours.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Training steps.", show_default="200")] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of the edges' log alphas.", show_default="0.2"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pairs of a forward.", show_default="8")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Forwards of a step.", show_default="1")
    ] = None,
    pairs: options.Pairs = None,
    held_out: options.HeldOut = HELD_OUT,
    task_set: options.TaskSet = None,
    ablation: options.Ablation = "counterfactual",
    objective: options.Objective = None,
    controller: Annotated[
        list[str] | None,
        typer.Option(
            help="How the run is made sparse: exact-budget, lagrangian or penalty, and NAME=VALUE "
            "for its fields; may be repeated.",
            show_default="exact-budget",
        ),
    ] = None,
    hard_share: Annotated[
        float | None,
        typer.Option(
            help="Last part of the run that keeps exactly the top edges.", show_default="0.4"
        ),
    ] = None,
    average_share: Annotated[
        float | None,
        typer.Option(
            help="Last part of the run whose log alphas are averaged for the ranking.",
            show_default="0.0",
        ),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            help="Late rankings that are judged, of which the best is kept.", show_default="10"
        ),
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of Optimizer, such as warmup=20; may be repeated."),
    ] = None,
    init_scores: Annotated[
        str | None,
        typer.Option(
            help="Where log alphas start: mask-ig, a scores.safetensors, or none.",
            show_default="mask-ig",
        ),
    ] = None,
    init_log_alpha: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Mean and spread of the first log alphas.", show_default="0.0 1.0"),
    ] = None,
    node_masks: Annotated[
        bool | None, typer.Option(help="Also learn a mask for each source.", show_default="no")
    ] = None,
    node_controller: Annotated[
        list[str] | None, typer.Option(help="As --controller, for the node masks.")
    ] = None,
    attachment: Annotated[
        float | None, typer.Option(help="Weight of a price on badly connected edges.")
    ] = None,
    split_qkv: Annotated[
        bool | None, typer.Option(help="Edges into queries, keys, values.", show_default="yes")
    ] = None,
    split_embeddings: Annotated[
        bool | None, typer.Option(help="Two embedding sources.", show_default="no")
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="span or position: a mask on every edge in each of them."),
    ] = None,
    neurons: Annotated[
        str | None,
        typer.Option(help="mlp or dimensions: also learn a gate for each neuron of that kind."),
    ] = None,
    n_neurons: Annotated[int | None, typer.Option(help="Neurons to keep, with --neurons.")] = None,
    neuron_controller: Annotated[
        list[str] | None, typer.Option(help="As --controller, for the neurons.")
    ] = None,
    bias_in_heads: Annotated[
        bool | None,
        typer.Option(help="Zero ablation removes a share of b_O too.", show_default="no"),
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Run blocks again in backward: far less memory.")
    ] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.", show_default="25")
    ] = None,
    cls: options.Class = "bridge",
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    seed: options.Seed = 0,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    dry_run: options.DryRun = False,
    pos: options.Pos = None,
    as_json: options.Json = False,
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
    values = {
        "n_edges": n_edges,
        "steps": steps,
        "lr": lr,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "ablation": whole_path(ablation),
        "objective": objective,
        "controller": _part("--controller", controller),
        "hard_share": hard_share,
        "average_share": average_share,
        "candidates": candidates,
        "optimizer": _part("--optimizer", optimizer),
        "init_scores": whole_path(init_scores),
        "init_log_alpha": None if init_log_alpha is None else list(init_log_alpha),
        "node_masks": node_masks,
        "node_controller": _part("--node-controller", node_controller),
        "attachment": attachment,
        "split_qkv": split_qkv,
        "split_embeddings": split_embeddings,
        "positions": positions,
        "neurons": neurons,
        "n_neurons": n_neurons,
        "neuron_controller": _part("--neuron-controller", neuron_controller),
        "bias_in_heads": bias_in_heads,
        "recompute": recompute,
        "checkpoint_every": checkpoint_every,
    }
    task_options = parsed("--task-set", task_set or [])
    inputs = Inputs(model, task, pairs, held_out, seed, dtype, device, cls, task_options).resolved()
    run = _run(inputs, values, paper)
    check_free(out, run)
    if dry_run:
        from tl_edgeprune.commands.jobs.dry_run import pruning, show_plan

        show_plan(pruning(run, pos) | {"out": str(out)}, as_json)
        return
    from tl_edgeprune.commands.jobs.prune import train

    train(out, run, new=True, as_json=as_json, progress=progress)


def _run(inputs: Inputs, given: dict[str, Any], paper: bool) -> Run:
    """The run with every setting resolved. Raises ValueError for settings that cannot work."""
    from tl_edgeprune.commands.jobs.prune import pruner_of
    from tl_edgeprune.commands.jobs.pruner_settings import resolved
    from tl_edgeprune.training.controllers import ExactBudget

    _check_objective(given["objective"])
    settings = resolved({k: v for k, v in given.items() if v is not None}, paper=paper)
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


def _part(option: str, texts: list[str] | None) -> dict[str, Any] | None:
    """Fields by name; a word alone is the kind."""
    if not texts:
        return None
    return parsed(option, [text if "=" in text else f"kind={text}" for text in texts])


def _check_objective(name: str | None) -> None:
    from tl_edgeprune.objectives import OBJECTIVES

    if name is not None and name not in OBJECTIVES:
        raise ValueError(
            f"--objective {name!r}: expected one of {', '.join(OBJECTIVES)}, or none for the "
            "task's own."
        )
