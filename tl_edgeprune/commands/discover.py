"""`tl-edgeprune discover`: score every edge by any method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tl_edgeprune.commands import options
from tl_edgeprune.commands.inputs import HELD_OUT, Inputs
from tl_edgeprune.commands.run_folder import Run, check_free, held
from tl_edgeprune.commands.told import told


@told
def discover(
    model: options.Model,
    task: options.TaskName,
    method: Annotated[str, typer.Option(help="Such as eap, eap-ig, mask-ig, acdc or exact.")],
    out: Annotated[Path, typer.Option(help="A new folder for what it writes.")],
    n_edges: Annotated[
        int | None, typer.Option(help="Also make and judge the circuit of this many top edges.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, NAME=VALUE; may be repeated."),
    ] = None,
    pairs: options.Pairs = None,
    held_out: options.HeldOut = HELD_OUT,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    seed: options.Seed = 0,
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
    from tl_edgeprune.commands.found import circuit_of, judged, write
    from tl_edgeprune.methods.registry import discover as find

    inputs = Inputs(model, task, pairs, held_out, seed, dtype, device).resolved()
    settings = _settings(method, setting or [], seed)
    if n_edges is not None and n_edges < 1:
        raise ValueError(f"--n-edges {n_edges}: a circuit needs at least one edge.")
    wanted = {"method": method, "n_edges": n_edges, **settings}
    run = Run.new("discover", inputs, wanted)
    check_free(out)
    with held(out), run.begun(out):
        loaded = inputs.load_model()
        found_on, judged_on = inputs.split(inputs.load_pairs(loaded))
        found = find(loaded, found_on, method, **settings)
        circuit = circuit_of(found, n_edges)
        figures = judged(loaded, circuit, judged_on)
        files = write(out, found, circuit, figures)
    if as_json:
        evaluation = None if figures is None else figures.to_dict()
        print(json.dumps({"out": str(out), "evaluation": evaluation, "files": files}))
        return
    if figures is not None:
        print(f"On {figures.n_pairs} pairs that the circuit was not found on:\n\n{figures}\n")
    print(f"In {out}/: {', '.join(files)}.")


def _settings(method: str, given: list[str], seed: int) -> dict[str, Any]:
    """NAME=VALUE as keyword arguments, and the seed where the method takes one."""
    from tl_edgeprune.methods.registry import settings_of

    known = settings_of(method)
    settings: dict[str, Any] = {"seed": seed} if "seed" in known else {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in known:
            raise ValueError(
                f"--set {text!r}: expected NAME=VALUE with one of {method}'s settings: "
                f"{', '.join(known)}."
            )
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings
