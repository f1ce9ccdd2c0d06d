"""`tl-edgeprune demo`: a real model, pruned in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tl_edgeprune.commands.common.errors import with_error_messages


@with_error_messages
def demo(
    task: Annotated[Literal["ioi-t1", "ioi"], typer.Option(help="The task.")] = "ioi-t1",
    n_edges: Annotated[int, typer.Option(help="Edges to keep.")] = 1000,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 150,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder for what it found.")] = Path("runs/demo"),
) -> None:
    """Prune SmolLM2-135M on indirect object identification.

    Example: tl-edgeprune demo --n-edges 500
    """
    from tl_edgeprune.commands.jobs.demo import run

    run(task, n_edges, steps, seed, out)
