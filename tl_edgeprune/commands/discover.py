"""`tl-edgeprune discover`: score every edge by any method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tl_edgeprune.commands import options
from tl_edgeprune.commands.inputs import HELD_OUT, Inputs
from tl_edgeprune.commands.named import parsed
from tl_edgeprune.commands.run_folder import Run, check_free
from tl_edgeprune.commands.told import told
from tl_edgeprune.locks import held


@told
def discover(
    model: options.Model,
    task: options.TaskName,
    method: Annotated[str, typer.Option(help="Such as eap, eap-ig, mask-ig, acdc or exact.")],
    out: Annotated[Path, typer.Option(help="A new folder for what it writes.")],
    n_edges: Annotated[
        int | None, typer.Option(help="Also make and judge the circuit of this many top edges.")
    ] = None,
    ablation: Annotated[
        str | None,
        typer.Option(
            help="What removed edges carry: counterfactual, zero, mean, mean-positional, or a file "
            "of constants (.safetensors).",
            show_default="counterfactual",
        ),
    ] = None,
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
    pos: options.Pos = 64,
    as_json: options.Json = False,
) -> None:
    """Score every edge by a method, and with --n-edges make a circuit of the top ones.

    --out then holds settings.json and scores.safetensors, and with --n-edges circuit.json,
    evaluation.json (on pairs held out) and circuit.html. ACDC chooses the size itself and gives a
    circuit without scores.

    Example: tl-edgeprune discover smollm2-135m ioi --method eap-ig --n-edges 1000 --out runs/eap

    With a setting: tl-edgeprune discover gpt2 ioi --method acdc --set threshold=0.01
    --out runs/acdc
    """
    from tl_edgeprune.commands.method_settings import method_settings
    from tl_edgeprune.methods.registry import settings_of

    task_options = parsed("--task-set", task_set or [])
    inputs = Inputs(model, task, pairs, held_out, seed, dtype, device, cls, task_options).resolved()
    given = parsed("--set", setting or [])
    known = settings_of(method)
    if "seed" in known:
        given = {"seed": seed} | given
    if ablation is not None:
        given = {"ablation": ablation} | given
    settings = method_settings(method, given)
    if "progress" in known:
        settings.setdefault("progress", progress and not as_json)
    _check_size(method, n_edges)
    wanted = {"method": method, "n_edges": n_edges, "absolute": absolute, "alive": alive, **given}
    check_free(out)
    if dry_run:
        from tl_edgeprune.commands.dry_run import discovering, show_plan

        sizes = [] if n_edges is None else [n_edges]
        show_plan(discovering(inputs, {method: given}, sizes, pos) | {"out": str(out)}, as_json)
        return
    run = Run.new("discover", inputs, wanted)
    _find(out, run, method, settings, as_json)


def _check_size(method: str, n_edges: int | None) -> None:
    """Raise ValueError for --n-edges where the method chooses the size, and below 1."""
    from tl_edgeprune.methods.registry import GIVE_CIRCUITS

    if n_edges is None:
        return
    if method in GIVE_CIRCUITS:
        raise ValueError(
            f"--n-edges {n_edges}: {method} chooses the circuit's size itself. Leave --n-edges "
            "out, and change the size by the method's settings (--set)."
        )
    if n_edges < 1:
        raise ValueError(f"--n-edges {n_edges}: a circuit needs at least one edge.")


def _find(out: Path, run: Run, method: str, settings: dict[str, Any], as_json: bool) -> None:
    from tl_edgeprune.commands.found import circuit_of, judged, write
    from tl_edgeprune.methods.registry import discover as find

    wanted, inputs = run.settings, run.inputs
    with held(out), run.begun(out, new=True):
        loaded = inputs.load_model()
        found_on, judged_on = inputs.split(inputs.load_pairs(loaded))
        found = find(loaded, found_on, method, **settings)
        if not found.metadata.get("finished", True):  # Edge Pruning keeps what Ctrl-C left it
            raise KeyboardInterrupt(
                f"stopped before the end of {method}: no scores are written. Start it anew in "
                "another folder."
            )
        how = {name: wanted[name] for name in ("absolute", "alive")}
        circuit = circuit_of(found, wanted["n_edges"], **how)
        figures = judged(loaded, circuit, judged_on, settings.get("ablation"))
        files = write(out, found, circuit, figures)
    if as_json:
        evaluation = None if figures is None else figures.to_dict()
        print(json.dumps({"out": str(out), "evaluation": evaluation, "files": files}))
        return
    if figures is not None:
        print(f"On {figures.n_pairs} pairs that the circuit was not found on:\n\n{figures}\n")
    print(f"In {out}/: {', '.join(files)}.")
