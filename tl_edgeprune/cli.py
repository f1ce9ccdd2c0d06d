"""The command line: the commands of `tl_edgeprune.commands`, by name.

tl-edgeprune prune smollm2-135m ioi --n-edges 1000 --out runs/ioi
tl-edgeprune resume runs/ioi
tl-edgeprune evaluate runs/ioi/circuit.json
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tl_edgeprune.commands.common.errors import error_json
from tl_edgeprune.commands.common.run_folder import COMMAND_LINE
from tl_edgeprune.commands.compare import compare
from tl_edgeprune.commands.demo import demo
from tl_edgeprune.commands.discover import discover
from tl_edgeprune.commands.evaluate import evaluate
from tl_edgeprune.commands.lists import ablations, methods, models, tasks
from tl_edgeprune.commands.plan import plan
from tl_edgeprune.commands.prune import prune
from tl_edgeprune.commands.resume import resume
from tl_edgeprune.commands.show import show
from tl_edgeprune.utils.versions import __version__

NAME = "tl-edgeprune"
COMMANDS = (
    prune,
    resume,
    evaluate,
    discover,
    compare,
    show,
    tasks,
    models,
    methods,
    ablations,
    plan,
    demo,
)
UsageError: Any = typer.BadParameter.__base__


def _show_version(wanted: bool) -> bool:
    if wanted:
        print(f"{NAME} {__version__}")
        raise typer.Exit
    return wanted


Version = Annotated[
    bool,
    typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
]


class _Group(TyperGroup):
    """Commands in the order of COMMANDS, which may ask for the whole command line.

    With --json wrong usage too is told as JSON.
    """

    def main(self, args: Sequence[str] | None = None, *rest: Any, **settings: Any) -> Any:
        arguments = sys.argv[1:] if args is None else list(args)
        if "--json" not in arguments:
            return super().main(arguments, *rest, **settings)
        try:
            sys.exit(super().main(arguments, *rest, **settings | {"standalone_mode": False}))
        except UsageError as error:
            print(error_json(error, error.format_message(), error.exit_code), file=sys.stderr)
            sys.exit(error.exit_code)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        COMMAND_LINE.set(shlex.join([NAME, *args]))
        return super().parse_args(ctx, args)


app = typer.Typer(
    name=NAME,
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def start(version: Version = False) -> None:
    """Finds circuits in TransformerLens models by Edge Pruning.

    Example: tl-edgeprune prune smollm2-135m ioi --n-edges 1000 --out runs/ioi
    """


for command in COMMANDS:
    app.command()(command)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and give its exit code; errors that a user can mend are one line on stderr."""
    try:
        app(args=arguments, prog_name=NAME)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
