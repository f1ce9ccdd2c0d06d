"""`tl-edgeprune evaluate`: how good a circuit is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tl_edgeprune.commands.common import options
from tl_edgeprune.commands.common.errors import with_error_messages
from tl_edgeprune.commands.common.inputs import CLASSES, DTYPES, Inputs
from tl_edgeprune.commands.common.run_folder import CONSTANTS, NEURONS, SETTINGS, Run, write_json
from tl_edgeprune.commands.common.values import parse_assignments


@with_error_messages
def evaluate(
    circuit: Annotated[Path, typer.Argument(help="A circuit.json.")],
    model: Annotated[str | None, typer.Option(help="Else that of the circuit's run.")] = None,
    task: Annotated[
        str | None, typer.Option(help="A name or a .jsonl file; else the run's held-out pairs.")
    ] = None,
    pairs: options.Pairs = None,
    task_set: options.TaskSet = None,
    ablation: Annotated[
        str | None,
        typer.Option(help="A name, or a file of constants (.safetensors); else the circuit's own."),
    ] = None,
    batch_size: options.BatchSize = 16,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; else the run's.")
    ] = None,
    cls: Annotated[
        str | None, typer.Option(help="bridge or hooked; else that of the circuit's run.")
    ] = None,
    device: options.Device = None,
    seed: Annotated[int, typer.Option(help="Of --task's pairs.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A file for the figures, as JSON.")] = None,
    as_json: options.Json = False,
) -> None:
    """Say how good a circuit is, every other edge replaced.

    A circuit in a run's folder is judged on the pairs that the run held out. With --task it is
    judged on all pairs of that task; a circuit without its run's folder needs --model and --task.
    One that was found with neurons is judged with the neurons.json beside it.

    Example: tl-edgeprune evaluate runs/ioi/circuit.json

    On another task: tl-edgeprune evaluate runs/ioi/circuit.json --task my-pairs.jsonl
    """
    from tl_edgeprune.evaluation.evaluate import evaluate as judge

    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: expected 1 or more.")
    circuit_of_file = load_circuit(circuit)
    inputs = _inputs(
        circuit, model, task, pairs, seed, parse_assignments("--task-set", task_set or [])
    )
    inputs = replace(
        inputs,
        dtype=_one_of("--dtype", dtype or inputs.dtype, DTYPES),
        cls=_one_of("--cls", cls or inputs.cls, CLASSES),
        device=device,
    ).resolve()
    constants, neurons = _ablation(circuit, circuit_of_file, ablation), _neurons(circuit)
    loaded = inputs.load_model()
    all_pairs = inputs.load_pairs(loaded)
    judged_on = all_pairs if task is not None else inputs.split(all_pairs)[1]
    figures = judge(
        loaded,
        circuit_of_file,
        judged_on,
        ablation=constants,
        batch_size=batch_size,
        neurons=neurons,
    )
    if out is not None:
        write_json(out, figures.to_dict())
    if as_json:
        print(json.dumps(figures.to_dict()))
        return
    print(f"{len(judged_on)} pairs of {judged_on.name}\n\n{figures}")


def load_circuit(path: Path) -> Any:
    """The Circuit of a file. Raises FileNotFoundError, and ValueError for a file that is none."""
    from tl_edgeprune.circuits.circuit import Circuit

    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: give its circuit, {path / 'circuit.json'}.")
    if not path.is_file():
        raise FileNotFoundError(
            f"circuit {str(path)!r}: no such file. Expected a circuit.json, as tl-edgeprune prune "
            "writes it."
        )
    return Circuit.load(path)


def _inputs(
    circuit: Path,
    model: str | None,
    task: str | None,
    pairs: int | None,
    seed: int,
    task_options: dict[str, Any],
) -> Inputs:
    """Those of the run that found the circuit, as far as they are not given."""
    if (circuit.parent / SETTINGS).is_file():
        inputs = Run.read(circuit.parent).inputs
        if task is None and (pairs is not None or task_options):
            raise ValueError(
                "--pairs and --task-set are for --task: without it the run's own held-out pairs "
                "are taken."
            )
    elif model is not None and task is not None:
        inputs = Inputs(model, task)
    else:
        raise ValueError(
            f"{circuit} has no {SETTINGS} beside it, which would tell its model and pairs: give "
            "--model and --task."
        )
    if model is not None:
        inputs = replace(inputs, model=model)
    if task is None:
        return inputs
    return replace(inputs, task=task, pairs=pairs, seed=seed, options=task_options)


def _one_of(option: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise ValueError(f"{option} {name!r}: expected one of {', '.join(known)}.")
    return name


def _neurons(circuit: Path) -> Any:
    """The neurons that the circuit's run kept beside it; None where all are."""
    from tl_edgeprune.circuits.neurons import Neurons

    path = circuit.parent / NEURONS
    return Neurons.load(path) if path.is_file() else None


def _ablation(path: Path, circuit: Any, given: str | None) -> Any:
    """What removed edges carry: as given, the run's learned constants, or the circuit's own."""
    from tl_edgeprune.ablation.constants import OPTIMAL, Constants
    from tl_edgeprune.ablation.kinds import check_ablation

    if (given or circuit.metadata.get("ablation")) == OPTIMAL:
        constants = path.parent / CONSTANTS
        if not constants.is_file():
            raise FileNotFoundError(
                f"{path} was found under learned constants, and there is no {CONSTANTS} beside it: "
                "put the run's there, or give --ablation."
            )
        return Constants.load(constants)
    if given is None:
        return None
    if given.endswith(".safetensors"):
        return Constants.load(given)
    check_ablation(given)
    return given
