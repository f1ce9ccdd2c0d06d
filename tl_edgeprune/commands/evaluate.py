"""`tl-edgeprune evaluate`: how good a circuit is."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tl_edgeprune.commands import options
from tl_edgeprune.commands.inputs import Inputs
from tl_edgeprune.commands.run_folder import CONSTANTS, SETTINGS, Run, write_json
from tl_edgeprune.commands.told import told


@told
def evaluate(
    circuit: Annotated[Path, typer.Argument(help="A circuit.json.")],
    model: Annotated[str | None, typer.Option(help="Else that of the circuit's run.")] = None,
    task: Annotated[
        str | None, typer.Option(help="A name or a .jsonl file; else the run's held-out pairs.")
    ] = None,
    pairs: options.Pairs = None,
    ablation: Annotated[str | None, typer.Option(help="Else the circuit's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs of a forward.")] = 16,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; else the run's.")
    ] = None,
    device: options.Device = None,
    seed: Annotated[int, typer.Option(help="Of --task's pairs.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A file for the figures, as JSON.")] = None,
    as_json: options.Json = False,
) -> None:
    """Say how good a circuit is, every other edge replaced.

    A circuit in a run's folder is judged on the pairs that the run held out. With --task it is
    judged on all pairs of that task; a circuit without its run's folder needs --model and --task.

    Example: tl-edgeprune evaluate runs/ioi/circuit.json

    On another task: tl-edgeprune evaluate runs/ioi/circuit.json --task my-pairs.jsonl
    """
    from tl_edgeprune.evaluate import evaluate as judge

    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: expected 1 or more.")
    found = load_circuit(circuit)
    inputs = _inputs(circuit, model, task, pairs, seed)
    inputs = replace(inputs, dtype=_dtype(dtype or inputs.dtype), device=device).resolved()
    constants = _ablation(circuit, found, ablation)
    loaded = inputs.load_model()
    all_pairs = inputs.load_pairs(loaded)
    judged_on = all_pairs if task is not None else inputs.split(all_pairs)[1]
    figures = judge(loaded, found, judged_on, ablation=constants, batch_size=batch_size)
    if out is not None:
        write_json(out, figures.to_dict())
    if as_json:
        print(json.dumps(figures.to_dict()))
        return
    print(f"{len(judged_on)} pairs of {judged_on.name}\n\n{figures}")


def load_circuit(path: Path) -> Any:
    """The Circuit of a file. Raises FileNotFoundError, and ValueError for a file that is none."""
    from tl_edgeprune.circuit import Circuit

    if not path.is_file():
        raise FileNotFoundError(
            f"circuit {str(path)!r}: no such file. Expected a circuit.json, as tl-edgeprune prune "
            "writes it."
        )
    return Circuit.load(path)


def _inputs(
    circuit: Path, model: str | None, task: str | None, pairs: int | None, seed: int
) -> Inputs:
    """Those of the run that found the circuit, as far as they are not given."""
    if (circuit.parent / SETTINGS).is_file():
        inputs = Run.read(circuit.parent).inputs
        if task is None and pairs is not None:
            print("--pairs is for --task: the run's own held-out pairs are taken.", file=sys.stderr)
    elif model is not None and task is not None:
        inputs = Inputs(model, task)
    else:
        raise ValueError(
            f"{circuit} has no {SETTINGS} beside it, which would tell its model and pairs: give "
            "--model and --task."
        )
    if model is not None:
        inputs = replace(inputs, model=model)
    return inputs if task is None else replace(inputs, task=task, pairs=pairs, seed=seed)


def _dtype(name: str) -> str:
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {name!r}: expected float32, bfloat16 or float16.")
    return name


def _ablation(path: Path, circuit: Any, given: str | None) -> Any:
    """What removed edges carry: as given, the run's learned constants, or the circuit's own."""
    from tl_edgeprune.constants import OPTIMAL, Constants
    from tl_edgeprune.masked import check_ablation

    if (given or circuit.metadata.get("ablation")) == OPTIMAL:
        constants = path.parent / CONSTANTS
        if not constants.is_file():
            raise FileNotFoundError(
                f"{path} was found under learned constants, and there is no {CONSTANTS} beside it: "
                "put the run's there, or give --ablation."
            )
        return Constants.load(constants)
    if given is not None:
        check_ablation(given)
    return given
