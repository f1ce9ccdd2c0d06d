"""What a user sees of an error: one line with what was given, what is expected and what to do.

Exit codes: 1 for a mistake in what was given, 2 for one in the usage, 130 for Ctrl-C. Every command
takes --debug, which shows where the error came from. A defect of the program keeps its traceback.
"""

from __future__ import annotations

import functools
import inspect
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

MISTAKES = (ValueError, OSError, NotImplementedError, ImportError)
ROOM = "Try --recompute, a smaller --batch-size with more --accumulate, or --dtype bfloat16."
SHOWN_FIRST = 5.0  # seconds that the first process has to tell what all of them ran into

Debug = Annotated[
    bool,
    typer.Option("--debug", envvar="TL_EDGEPRUNE_DEBUG", help="Show where an error came from."),
]


def told(command: Callable[..., None]) -> Callable[..., None]:
    """The command with --debug, its errors told in one line."""
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False)
    parameters = [*signature.parameters.values(), option.replace(annotation=Debug)]

    @functools.wraps(command)
    def run(*, debug: bool = False, **options: Any) -> None:
        try:
            command(**options)
        except KeyboardInterrupt as stop:
            _tell(stop, str(stop) or "stopped.", debug)
            raise typer.Exit(130) from None
        except MISTAKES as error:
            _tell(error, _one_line(error), debug)
            raise typer.Exit(1) from None
        except RuntimeError as error:
            _tell(error, _runtime_message(error), debug)
            raise typer.Exit(1) from None

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@contextmanager
def processes() -> Iterator[Any]:
    """torchrun's processes (Ranks), or this one alone. What all ran into, the first one tells."""
    from tl_edgeprune.distributed import started

    with started() as ranks:
        try:
            yield ranks
        except MISTAKES:
            if not ranks.first:
                time.sleep(SHOWN_FIRST)  # once the first has ended, torchrun ends this one
            raise


def _tell(error: BaseException, message: str, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    print(f"tl-edgeprune: {message}", file=sys.stderr)


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
