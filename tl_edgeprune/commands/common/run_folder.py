"""A run's folder: one run in each, and one process at work in it.

settings.json is written first and never changed: what `resume` and `evaluate` go by. circuit.json
(of a ranking alone: scores.safetensors) is written last, so where it is, the run is finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_edgeprune.commands.common.errors import MISTAKES
from tl_edgeprune.commands.common.inputs import Inputs
from tl_edgeprune.utils.reading import check_type, read_json, reporting_damage
from tl_edgeprune.utils.writing import write_whole

FORMAT, KIND = 1, "tl_edgeprune run"
AGAIN = "If its version is another, or it cannot be repaired, start the run in another folder."
SETTINGS, CHECKPOINT = "settings.json", "checkpoint.safetensors"
CIRCUIT, SCORES, EVALUATION = "circuit.json", "scores.safetensors", "evaluation.json"
CONSTANTS, NEURONS = "constants.safetensors", "neurons.json"
HISTORY, PAGE = "history.png", "circuit.html"
TABLE, PICTURE = "table.csv", "comparison.png"
FILES = (
    *(SETTINGS, CHECKPOINT, CIRCUIT, SCORES, EVALUATION, CONSTANTS, NEURONS, HISTORY, PAGE),
    *(TABLE, PICTURE),
)
COMMAND_LINE = ContextVar("command_line", default="")


@dataclass(frozen=True)
class Run:
    """What a run was asked for: the command, its inputs and its own settings."""

    command: str
    inputs: Inputs
    settings: dict[str, Any]
    versions: dict[str, str]
    command_line: str = ""

    @classmethod
    def new(cls, command: str, inputs: Inputs, settings: dict[str, Any]) -> Run:
        from tl_edgeprune.utils.versions import versions

        return cls(command, inputs, settings, versions(), COMMAND_LINE.get())

    @classmethod
    def read(cls, folder: Path) -> Run:
        """A folder's run. Raises FileNotFoundError for none and ValueError for a damaged one."""
        path = folder / SETTINGS
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no run: it has no {SETTINGS}. Give a folder that tl-edgeprune "
                "prune, discover or compare wrote (--out)."
            )
        document = read_json(path, "file of settings", AGAIN)
        with reporting_damage(path, AGAIN):
            if (document["kind"], document["format"]) != (KIND, FORMAT):
                raise ValueError(f"kind {document['kind']!r}, format {document['format']!r}")
            return cls(
                check_type(document["command"], str, "command"),
                Inputs.from_dict(document["inputs"]),
                check_type(document["settings"], dict, "settings"),
                check_type(document["versions"], dict, "versions"),
                check_type(document["command_line"], str, "command_line"),
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "format": FORMAT,
            "command": self.command,
            "command_line": self.command_line,
            "seed": self.inputs.seed,
            "inputs": self.inputs.to_dict(),
            "settings": self.settings,
            "versions": self.versions,
        }

    @contextmanager
    def begun(self, folder: Path, *, new: bool) -> Iterator[None]:
        """settings.json in the folder, which is this run's or, for a new run, free (`check_free`).
        A mistake that shows before there is anything else puts back what was there, so that the
        folder is free for the next try.
        """
        if new:
            check_free(folder, self)
        path = folder / SETTINGS
        content = path.read_bytes() if path.is_file() else None
        write_json(path, self.to_dict())
        try:
            yield
        except MISTAKES:
            if content is not None:
                write_whole(path, content)
            elif not any((folder / name).exists() for name in FILES if name != SETTINGS):
                path.unlink()
            raise


def check_free(folder: Path, run: Run | None = None) -> None:
    """Raise FileExistsError where the folder holds a run's files, or is none. run: what is asked
    for, to tell its own folder by.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--out {folder} is a file: give a folder.")
    files = [name for name in FILES if (folder / name).exists()]
    if files:
        unfinished = SETTINGS in files and not {CIRCUIT, SCORES} & {*files}
        is_this_run = run is not None and _is_of(folder, run)
        if unfinished:
            advice = f": continue it by tl-edgeprune resume {folder}, or give a new folder."
        elif is_this_run:
            advice = f", and it is finished. {_look_at(folder)} For another run give a new folder."
        else:
            advice = ": runs do not mix: give a new folder."
        owner = "this run" if is_this_run else "another run"
        raise FileExistsError(f"--out {folder} holds {owner} ({', '.join(files)}){advice}")


def _is_of(folder: Path, run: Run) -> bool:
    """Whether the folder's run is the one asked for: the same command, inputs and settings."""
    try:
        saved = Run.read(folder)
    except MISTAKES:
        return False
    expected = [run.command, run.inputs.to_dict(), run.settings]
    return json.loads(json.dumps(expected)) == [
        saved.command,
        saved.inputs.to_dict(),
        saved.settings,
    ]


def _look_at(folder: Path) -> str:
    """What to do with a finished run."""
    if not (folder / CIRCUIT).is_file():
        return f"Its scores are in {folder / SCORES} (EdgeScores.load)."
    page = f"Open {folder / PAGE}" if (folder / PAGE).is_file() else "Look at it"
    hint = "" if (folder / PAGE).is_file() else f" with tl-edgeprune show {folder / CIRCUIT}"
    return f"{page}{hint}, or judge it on other pairs with tl-edgeprune evaluate."


def write_json(path: Path, document: Any) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(document, indent=1) + "\n").encode())
