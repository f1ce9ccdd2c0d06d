"""`tl-edgeprune discover`: score every edge by any method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tl_edgeprune.commands.common import options
from tl_edgeprune.commands.common.errors import with_error_messages
from tl_edgeprune.commands.common.inputs import HELD_OUT, Inputs
from tl_edgeprune.commands.common.run_folder import Run, check_free
from tl_edgeprune.commands.common.values import parse_assignments, whole_path


@with_error_messages
def discover(
    model: options.Model,
    task: options.TaskName,
    method: Annotated[str, typer.Option(help="Such as eap, eap-ig, mask-ig, acdc or exact.")],
    out: Annotated[Path, typer.Option(help="A new folder for the results.")],
    n_edges: Annotated[
        int | None, typer.Option(help="Also make and evaluate the circuit of this many top edges.")
    ] = None,
    ablation: options.Ablation = None,
    absolute: options.Absolute = None,
    alive: options.Alive = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, NAME=VALUE; may be repeated."),
    ] = None,
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
) -> None:
    """Score every edge by a method, and with --n-edges make a circuit of the top ones.

    --out then holds settings.json and scores.safetensors, and with --n-edges circuit.json,
    evaluation.json (on pairs held out) and circuit.html. ACDC chooses the size itself and gives a
    circuit without scores. A run that was stopped or killed continues by resume.

    Example: tl-edgeprune discover smollm2-135m ioi --method eap-ig --n-edges 1000 --out runs/eap

    With a setting: tl-edgeprune discover gpt2 ioi --method acdc --set threshold=0.01
    --out runs/acdc
    """
    from tl_edgeprune.commands.jobs.discover import search_in
    from tl_edgeprune.commands.jobs.method_settings import method_settings
    from tl_edgeprune.methods.registry import find_method

    task_options = parse_assignments("--task-set", task_set or [])
    inputs = Inputs(model, task, pairs, held_out, seed, dtype, device, cls, task_options).resolve()
    values = parse_assignments("--set", setting or [])
    if "seed" in find_method(method).parameters:
        values = {"seed": seed} | values
    if ablation is not None:
        values = {"ablation": whole_path(ablation)} | values
    method_settings(method, values)
    _check_needed(method, values)
    _check_size(method, n_edges)
    _check_top(method, n_edges, absolute, alive)
    how = {"absolute": absolute, "alive": alive}
    run_settings = {"method": method, "n_edges": n_edges, "settings": values, **how}
    run = Run.new("discover", inputs, run_settings)
    check_free(out, run)
    if dry_run:
        from tl_edgeprune.commands.jobs.dry_run import plan_of_discover, show_plan

        sizes = [] if n_edges is None else [n_edges]
        show_plan(
            plan_of_discover(inputs, {method: values}, sizes, pos) | {"out": str(out)}, as_json
        )
        return
    search_in(out, run, new=True, as_json=as_json, progress=progress)


def _check_needed(method: str, given: dict[str, Any]) -> None:
    """Raise ValueError for a setting that the method cannot do without."""
    from tl_edgeprune.methods.registry import find_method

    missing = [name for name in find_method(method).required if name not in given]
    if missing:
        raise ValueError(f"{method} needs {' and '.join(missing)}: give --set {missing[0]}=….")


def _check_top(method: str, n_edges: int | None, absolute: bool | None, alive: bool) -> None:
    """Raise ValueError for an option of taking top edges where none are taken."""
    from tl_edgeprune.methods.registry import find_method

    own_size = find_method(method).gives_circuit
    option = "--absolute" if absolute else "--signed"
    if absolute is not None and own_size:
        raise ValueError(f"{option}: {method} ranks no edges. Leave it out.")
    if n_edges is None and (absolute is not None or (alive and not own_size)):
        option = "--alive" if absolute is None else option
        raise ValueError(f"{option} is for a circuit's edges: give --n-edges, or leave it out.")


def _check_size(method: str, n_edges: int | None) -> None:
    """Raise ValueError for --n-edges where the method chooses the size, and below 1."""
    from tl_edgeprune.methods.registry import find_method

    if n_edges is None:
        return
    if find_method(method).gives_circuit:
        raise ValueError(
            f"--n-edges {n_edges}: {method} chooses the circuit's size itself. Leave --n-edges "
            "out, and change the size by the method's settings (--set)."
        )
    if n_edges < 1:
        raise ValueError(f"--n-edges {n_edges}: a circuit needs at least one edge.")
