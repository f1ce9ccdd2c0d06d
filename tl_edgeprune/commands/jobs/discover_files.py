"""What `discover` makes of what a method found: a circuit, its figures, and the files of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl_edgeprune.ablation.constants import Ablation, Constants
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.commands.common.run_folder import (
    CIRCUIT,
    CONSTANTS,
    EVALUATION,
    PAGE,
    SCORES,
    write_json,
)
from tl_edgeprune.evaluation.evaluate import Evaluation, evaluate
from tl_edgeprune.tasks import Task


def circuit_of(
    found: EdgeScores | Circuit, n_edges: int | None, *, absolute: bool | None, alive: bool
) -> Circuit | None:
    """The circuit of this size, or the method's own."""
    if isinstance(found, Circuit):
        return found.without_dead_edges() if alive else found
    return None if n_edges is None else found.top(n_edges, absolute=absolute, alive=alive)


def evaluate_found(
    model: Any, circuit: Circuit | None, pairs: Task, ablation: Ablation | None
) -> Evaluation | None:
    """The circuit's figures, where there is one."""
    return None if circuit is None else evaluate(model, circuit, pairs, ablation=ablation)


def write(
    out: Path,
    found: EdgeScores | Circuit,
    circuit: Circuit | None,
    figures: Evaluation | None,
    ablation: Ablation | None,
) -> list[str]:
    """Write the files, the circuit last; their names."""
    files = []
    if isinstance(ablation, Constants):
        ablation.save(out / CONSTANTS)  # evaluate takes them from there
        files.append(CONSTANTS)
    scores = found if isinstance(found, EdgeScores) else None
    if scores is not None:
        scores.save(out / SCORES)
        files.append(SCORES)
    if circuit is not None and figures is not None:
        write_json(out / EVALUATION, figures.to_dict())
        circuit.report(out / PAGE, measures=figures, scores=scores)
        circuit.save(out / CIRCUIT)
        files += [CIRCUIT, EVALUATION, PAGE]
    return files
