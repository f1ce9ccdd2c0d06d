"""A run of Edge Pruning in a folder, by its settings: `prune` begins it, `resume` ends it.

1. The pairs and their split, the model and every draw come from settings.json.
2. The checkpoint is written every 25 steps, so a run that was killed continues from there, to the
   same bits.
3. Under torchrun every process trains, and the first alone writes and prints.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from tl_edgeprune.commands.common.errors import process_group
from tl_edgeprune.commands.common.run_folder import (
    AGAIN,
    CHECKPOINT,
    CIRCUIT,
    CONSTANTS,
    EVALUATION,
    HISTORY,
    NEURONS,
    PAGE,
    SCORES,
    SETTINGS,
    Run,
    write_json,
)
from tl_edgeprune.commands.jobs.pruner_settings import build_setting
from tl_edgeprune.evaluation.evaluate import Evaluation, evaluate
from tl_edgeprune.report import plot_history
from tl_edgeprune.report.circuit.labels import title_of
from tl_edgeprune.tasks import Task
from tl_edgeprune.training.pruner import EdgePruner
from tl_edgeprune.training.result import PruneResult
from tl_edgeprune.utils.locks import locked_folder
from tl_edgeprune.utils.reading import reporting_damage


def pruner_of(run: Run, folder: Path, progress: bool = True) -> EdgePruner:
    """The run's EdgePruner. Raises ValueError for settings that cannot work."""
    return EdgePruner(
        **{name: build_setting(name, value) for name, value in run.settings.items()},
        seed=run.inputs.seed,
        checkpoint=folder / CHECKPOINT,
        progress=progress,
    )


def train(folder: Path, run: Run, *, new: bool, as_json: bool, progress: bool = True) -> None:
    """Begin the folder's run, or continue it, and write what it finds."""
    with nullcontext() if new else reporting_damage(folder / SETTINGS, AGAIN):
        pruner = pruner_of(run, folder, progress=progress and not as_json)
    with (
        process_group() as ranks,
        locked_folder(folder) if ranks.first else nullcontext(),
        ExitStack() as stack,
    ):
        if new and ranks.first:
            stack.enter_context(run.begun(folder, new=True))
        model = run.inputs.load_model()
        found_on, held_out = run.inputs.split(run.inputs.load_pairs(model))
        if ranks.first and not as_json:
            print(
                f"{len(found_on)} pairs to find the circuit on, {len(held_out)} to judge it on.",
                file=sys.stderr,
            )
        checkpoint = None if new or not (folder / CHECKPOINT).is_file() else folder / CHECKPOINT
        result = pruner.fit(model, found_on, resume=checkpoint)
        if not result.finished:
            raise KeyboardInterrupt(
                f"stopped after {len(result.history)} of {pruner.steps} steps. Go on with "
                f"tl-edgeprune resume {folder}"
            )
        if ranks.first:
            figures, files = write_results(folder, result, model, held_out)
            show_results(folder, figures, files, as_json)


def write_results(
    folder: Path, result: PruneResult, model: Any, held_out: Task
) -> tuple[Evaluation, list[str]]:
    """Everything that a finished run leaves, the circuit last: its figures, the files' names."""
    files = [CIRCUIT, SCORES, EVALUATION, HISTORY, PAGE]
    figures = evaluate(
        model, result.circuit, held_out, ablation=result.constants, neurons=result.neurons
    )
    if result.neurons is not None:
        result.neurons.save(folder / NEURONS)
        files.append(NEURONS)
    if result.constants is not None:
        result.constants.save(folder / CONSTANTS)
        files.append(CONSTANTS)
    result.scores.save(folder / SCORES)
    write_json(folder / EVALUATION, figures.to_dict())
    circuit = result.circuit
    plot_history(result.history, folder / HISTORY, title=title_of(circuit))
    circuit.report(folder / PAGE, measures=figures, result=result)
    circuit.save(folder / CIRCUIT)
    return figures, files


def show_results(folder: Path, figures: Evaluation, files: list[str], as_json: bool) -> None:
    """What a run found, as text or as one JSON object."""
    if as_json:
        print(json.dumps({"out": str(folder), "evaluation": figures.to_dict(), "files": files}))
        return
    print(f"On {figures.n_pairs} pairs that the circuit was not found on:\n\n{figures}\n")
    print(f"In {folder}/: {', '.join(files)}.")
