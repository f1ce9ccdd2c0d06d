"""A comparison on disk: what each run found and its figures, so that a killed one can continue.

A run's files have its name: a note (.json) with what the run is and its figures, and the scores
(.safetensors) or the circuit (.circuit.json). Every file is written whole, and the note last.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.evaluation.evaluate import Evaluation
from tl_edgeprune.evaluation.measures import MEASURES
from tl_edgeprune.methods.registry import Found
from tl_edgeprune.runs.fingerprint import of_setting, of_task, of_weights
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.utils.profiling import Cost
from tl_edgeprune.utils.reading import check_type, read_json, reporting_damage
from tl_edgeprune.utils.versions import versions
from tl_edgeprune.utils.writing import write_whole

FORMAT = 1
KIND = "tl_edgeprune comparison"
AGAIN = "Remove it, and the method runs again."


class Run(NamedTuple):
    """One call of a method, and the sizes to take from what it gives."""

    name: str  # of its files
    method: str
    settings: dict[str, Any]
    sizes: tuple[int, ...]


class Folder:
    """A comparison's results on disk: for each run a note of JSON and what it found.

    The note is written last, so a run without a finished note is made again.
    """

    def __init__(self, path: Path, model: Any, train: Task, held_out: Task, **shared: Any) -> None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"compare: path={str(path)!r} is a file, expected a folder.")
        self.path = path
        self.shared = {
            "format": FORMAT,
            "model": of_weights(model),
            "train": of_task(train),
            "held_out": of_task(held_out),
            **shared,
        }

    def file(self, run: Run, ending: str) -> Path:
        return self.path / f"{run.name}.{ending}"

    def check(self, runs: list[Run]) -> None:
        """Raise ValueError where a run's note is of another comparison."""
        for run in runs:
            if not self.file(run, "json").is_file():
                continue
            note = self._note(run)
            for key, value in self._identity(run).items():
                if note["identity"].get(key) != value:
                    raise ValueError(
                        f"{self.file(run, 'json')} is of another comparison: its {key} is "
                        f"{note['identity'].get(key)!r}, here it is {value!r}. Give another path, "
                        "or remove the file."
                    )

    def begin(self, run: Run) -> float:
        """Say which run starts, for one that comes after it was killed.

        Gives the seconds that runs which were killed have put into the checkpoint that is there;
        0 without one. A checkpoint that no note tells of is removed.
        """
        checkpoint, spent = self.file(run, "checkpoint"), 0.0
        if not self.file(run, "json").is_file():
            checkpoint.unlink(missing_ok=True)
        if checkpoint.is_file():
            note = self._note(run)
            saved = max(0.0, checkpoint.stat().st_mtime - note.get("began", math.inf))
            spent = note.get("spent", 0.0) + saved
        nothing = {"cost": None, "found": None, "figures": None}
        self._write_note(run, nothing | {"began": time.time(), "spent": spent})
        return spent

    def write(self, run: Run, found: Found, cost: Cost, figures: list[Evaluation] | None) -> None:
        kind = "circuit" if isinstance(found, Circuit) else "scores"
        found.save(self.file(run, "circuit.json" if kind == "circuit" else "safetensors"))
        rows = None if figures is None else [evaluation.to_dict() for evaluation in figures]
        self._write_note(run, {"cost": vars(cost), "found": kind, "figures": rows})
        self.file(run, "checkpoint").unlink(missing_ok=True)

    def read(self, run: Run) -> tuple[Found, Cost, list[Evaluation] | None] | None:
        """What is there of a run; None where it did not finish."""
        if not self.file(run, "json").is_file():
            return None
        note = self._note(run)
        if note["found"] is None:
            return None
        result: Found
        if note["found"] == "circuit":
            result = Circuit.load(self.file(run, "circuit.json"))
        else:
            result = EdgeScores.load(self.file(run, "safetensors"))
        evaluations = None
        if note["figures"] is not None and all(map(_has_every_measure, note["figures"])):
            evaluations = [Evaluation.from_dict(each) for each in note["figures"]]
        return result, Cost(**note["cost"]), evaluations

    def _identity(self, run: Run) -> dict[str, Any]:
        identity = self.shared | {"method": run.method, "settings": of_setting(run.settings)}
        return json.loads(json.dumps(identity))

    def _write_note(self, run: Run, fields: dict[str, Any]) -> None:
        note = {"kind": KIND, "identity": self._identity(run), **fields, "versions": versions()}
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.file(run, "json"), json.dumps(note, indent=1).encode())

    def _note(self, run: Run) -> dict[str, Any]:
        path = self.file(run, "json")
        note = read_json(path, "result of compare", AGAIN)
        expected = {"kind", "identity", "cost", "found", "figures"}
        if not isinstance(note, dict) or note.get("kind") != KIND or expected - set(note):
            raise ValueError(
                f"{path} is no result of compare: give another path, or remove the file."
            )
        with reporting_damage(path, AGAIN):
            _check_note(note)
        return note


def _has_every_measure(figures: Mapping[str, Any]) -> bool:
    """Whether none was registered since they were written."""
    return {name for name, measure in MEASURES.items() if measure.reported} <= set(figures)


def _check_note(note: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError for values that `Folder.write` does not write."""
    check_type(note["identity"], dict, "identity")
    for name in ("began", "spent"):
        check_type(note.get(name, 0.0), float, name)
    if note["found"] not in (None, "circuit", "scores"):
        raise ValueError(f"found is {note['found']!r}")
    numbers = [note["cost"]] if note["found"] is not None else []
    for number in (*numbers, *(note["figures"] or ())):
        for name, value in check_type(number, dict, "figures").items():
            if value is not None:
                check_type(value, float, name)
    for cost in numbers:
        Cost(**cost)
    for figures in check_type(note["figures"] or [], list, "figures"):
        Evaluation.from_dict(figures)
