"""What a user sees of an error: one line with what was given, what is expected and what to do.

Exit codes: 1 for a mistake in what was given, 2 for one in the usage, 130 for Ctrl-C, 141 where
nobody reads the output on (`… | head`). With --json an error is one JSON object, the last line on
stderr. Every command takes --debug, which shows where the error came from, --config and --plugin. A
defect of the program keeps its traceback.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from tl_edgeprune.commands.common.config import Config
from tl_edgeprune.commands.common.plugins import Plugin, load_plugins

MISTAKES = (ValueError, OSError, NotImplementedError, ImportError)
MISTAKE, USAGE, STOPPED, UNREAD = 1, 2, 130, 141
ROOM = "Try --recompute, a smaller --batch-size with more --accumulate, or --dtype bfloat16."
SHOWN_FIRST = 5.0  # seconds that the first process has to tell what all of them ran into
Debug = Annotated[
    bool,
    typer.Option("--debug", envvar="TL_EDGEPRUNE_DEBUG", help="Show where an error came from."),
]


def with_error_messages(command: Callable[..., None]) -> Callable[..., None]:
    """The command with --plugin, --config and --debug, its errors told in one line."""
    signature = inspect.signature(command, eval_str=True)
    added = {"plugin": (Plugin, None), "config": (Config, None), "debug": (Debug, False)}
    parameters = [*signature.parameters.values()]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in added.items()
    ]

    @functools.wraps(command)
    def run(*, plugin: Any = None, config: Any = None, debug: bool = False, **options: Any) -> None:
        tell = functools.partial(_tell, debug=debug, as_json=options.get("as_json", False))
        try:
            load_plugins(plugin or ())
            command(**options)
            sys.stdout.flush()
        except KeyboardInterrupt as stop:
            raise tell(stop, str(stop) or "stopped.", STOPPED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
            raise typer.Exit(UNREAD) from None
        except MISTAKES as error:
            raise tell(error, _one_line(error), MISTAKE) from None
        except RuntimeError as error:
            raise tell(error, _runtime_message(error), MISTAKE) from None

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@contextmanager
def process_group() -> Iterator[Any]:
    """torchrun's processes (Ranks), or this one alone. What all ran into, the first one tells."""
    from tl_edgeprune.distributed import started

    with started() as ranks:
        try:
            yield ranks
        except MISTAKES:
            if not ranks.first:
                time.sleep(SHOWN_FIRST)  # once the first has ended, torchrun ends this one
            raise


def error_json(error: BaseException, message: str, code: int) -> str:
    """An error as one JSON object in one line."""
    return json.dumps({"error": message, "kind": type(error).__name__, "exit_code": code})


def _tell(
    error: BaseException, message: str, code: int, *, debug: bool, as_json: bool
) -> typer.Exit:
    """Write the error to stderr; the way out."""
    if debug:
        traceback.print_exception(error)
    line = error_json(error, message, code) if as_json else f"tl-edgeprune: {message}"
    print(line, file=sys.stderr)
    return typer.Exit(code)


def _runtime_message(error: RuntimeError) -> str:
    """Of a lost process, or of memory that ran out; any other is a defect and is raised again."""
    import torch

    from tl_edgeprune.distributed import LostProcess

    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {_one_line(error)} {ROOM}"
    if not isinstance(error, LostProcess):
        raise error
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
