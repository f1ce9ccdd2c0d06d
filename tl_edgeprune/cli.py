"""The command line: the commands of `tl_edgeprune.commands`, by name.

tl-edgeprune prune smollm2-135m ioi --n-edges 1000 --out runs/ioi
tl-edgeprune resume runs/ioi
tl-edgeprune evaluate runs/ioi/circuit.json
"""

from __future__ import annotations

import shlex
from typing import Any

import typer
from typer.core import TyperGroup

from tl_edgeprune.commands.demo import demo
from tl_edgeprune.commands.discover import discover
from tl_edgeprune.commands.evaluate import evaluate
from tl_edgeprune.commands.lists import methods, models, tasks
from tl_edgeprune.commands.plan import plan
from tl_edgeprune.commands.prune import prune
from tl_edgeprune.commands.resume import resume
from tl_edgeprune.commands.run_folder import COMMAND_LINE
from tl_edgeprune.commands.show import show

NAME = "tl-edgeprune"
COMMANDS = (prune, resume, evaluate, discover, show, tasks, models, methods, plan, demo)


class _Group(TyperGroup):
    """Commands in the order of COMMANDS, which may ask for the whole command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        COMMAND_LINE.set(shlex.join([NAME, *args]))
        return super().parse_args(ctx, args)


app = typer.Typer(
    name=NAME,
    cls=_Group,
    help="Finds circuits in TransformerLens models by Edge Pruning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and give its exit code; errors that a user can mend are one line on stderr."""
    try:
        app(args=arguments, prog_name=NAME)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
