"""`tl-edgeprune resume`: continue a run that was stopped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tl_edgeprune.commands.common import options
from tl_edgeprune.commands.common.errors import with_error_messages
from tl_edgeprune.commands.common.run_folder import CIRCUIT, SCORES, Run


@with_error_messages
def resume(
    folder: Annotated[
        Path, typer.Argument(help="The --out of a prune, discover or compare that did not end.")
    ],
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    as_json: options.Json = False,
) -> None:
    """Continue a prune, a discover or a compare that was stopped or killed.

    Model, task and settings are those of the folder's settings.json, and the run continues from its
    last checkpoint (without one, from the start), to the same circuit as if it had never stopped.
    A comparison keeps the methods that are done.

    Example: tl-edgeprune resume runs/ioi
    """
    from tl_edgeprune.utils.versions import versions

    run = Run.read(folder)
    _check_unfinished(folder, run)
    for name, version in versions().items():
        if run.versions.get(name) != version:
            print(
                f"The run began with {name} {run.versions.get(name)}, this is {version}: its last "
                "digits may differ.",
                file=sys.stderr,
            )
    if run.command == "prune":
        from tl_edgeprune.commands.jobs.prune import train

        train(folder, run, new=False, as_json=as_json, progress=progress)
    elif run.command == "discover":
        from tl_edgeprune.commands.jobs.discover import search_in

        search_in(folder, run, new=False, as_json=as_json, progress=progress)
    else:
        from tl_edgeprune.commands.jobs.compare import compare_in

        compare_in(folder, run, as_json=as_json, progress=progress)


def _check_unfinished(folder: Path, run: Run) -> None:
    """Raise ValueError for a finished run, and for a command whose runs do not resume."""
    if run.command not in ("prune", "discover", "compare"):
        raise ValueError(
            f"{folder} holds a run of {run.command}, which writes no checkpoint: start it anew in "
            "another folder."
        )
    if (folder / CIRCUIT).is_file():
        raise ValueError(
            f"{folder} holds a finished run: look at it with tl-edgeprune evaluate "
            f"{folder / CIRCUIT}"
        )
    ranking = run.command == "discover" and run.settings.get("n_edges") is None
    if ranking and (folder / SCORES).is_file():
        raise ValueError(f"{folder} holds a finished run: {folder / SCORES} is what it found.")
