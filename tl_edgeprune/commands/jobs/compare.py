"""A comparison in a folder, by its settings: `compare` begins it and continues it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tl_edgeprune.commands.common.run_folder import AGAIN, PICTURE, SETTINGS, TABLE, Run, check_free
from tl_edgeprune.commands.jobs.method_settings import compared_settings
from tl_edgeprune.evaluation.compare import compare
from tl_edgeprune.evaluation.comparison import Comparison
from tl_edgeprune.utils.locks import locked_folder
from tl_edgeprune.utils.reading import check_type, reporting_damage
from tl_edgeprune.utils.writing import write_whole

KINDS = {"methods": list, "sizes": list, "settings": dict, "absolute": bool, "alive": bool}
KINDS |= {"ablation": str, "batch_size": int}
MAY_DIFFER = ("methods", "settings", "batch_size")


def check_same(folder: Path, run: Run) -> None:
    """Raise FileExistsError where the folder holds anything but this comparison, with these methods
    or others.
    """
    if not (folder / SETTINGS).is_file() or Run.read(folder).command != "compare":
        check_free(folder)
        return
    saved = Run.read(folder)
    old, new = ({**r.inputs.to_dict(), **r.settings} for r in (saved, run))
    for name, value in json.loads(json.dumps(new)).items():
        if name not in MAY_DIFFER and old.get(name) != value:
            raise FileExistsError(
                f"--out {folder} holds a comparison with {name} {old.get(name)!r}, here it is "
                f"{value!r}: give a new folder, or continue with tl-edgeprune resume {folder}."
            )


def compare_in(folder: Path, run: Run, *, as_json: bool, progress: bool = True) -> None:
    """Make what is not in the folder yet, and write the table and the picture."""
    settings, inputs = dict(run.settings), run.inputs
    with reporting_damage(folder / SETTINGS, AGAIN):
        _check_kinds(settings)
        methods, of_methods = settings.pop("methods"), settings.pop("settings")
        compared = {name: compared_settings(name, values) for name, values in of_methods.items()}
    with locked_folder(folder), run.begun(folder, new=False):
        model = inputs.load_model()
        train, held_out = inputs.split(inputs.load_pairs(model))
        try:
            table = compare(
                model,
                train,
                held_out,
                methods,
                settings.pop("sizes"),
                settings=compared,
                seed=inputs.seed,
                path=folder,
                progress=progress and not as_json,
                **settings,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped. Go on with tl-edgeprune resume {folder}") from None
        write_whole(folder / TABLE, table.table.to_csv(index=False).encode())
        table.plot(folder / PICTURE)
    _show(folder, table, as_json)


def _check_kinds(settings: dict[str, Any]) -> None:
    """Raise KeyError or ValueError for settings that no comparison has."""
    for name, kind in KINDS.items():
        check_type(settings[name], kind, name)
    if set(settings) - set(KINDS):
        raise ValueError(f"settings of a comparison are {', '.join(KINDS)}")


def _show(folder: Path, found: Comparison, as_json: bool) -> None:
    files = [SETTINGS, TABLE, PICTURE]
    if as_json:
        rows: list[dict[str, Any]] = list(found.rows)
        print(json.dumps({"out": str(folder), "rows": rows, "files": files}))
        return
    print(f"{found}\n\nIn {folder}/: {', '.join(files)}, and what each method found.")
