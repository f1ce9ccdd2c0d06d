"""`tl-edgeprune tasks`, `models`, `methods` and `ablations`: names that the other commands take."""

from __future__ import annotations

import json

from tl_edgeprune.commands.common import options
from tl_edgeprune.commands.common.errors import with_error_messages


@with_error_messages
def tasks(as_json: options.Json = False) -> None:
    """List the tasks that the other commands know by name.

    Example: tl-edgeprune tasks
    """
    from tl_edgeprune import tasks as known

    _show(known.list(), "A .jsonl file of prompt pairs is a task too.", as_json)


@with_error_messages
def models(as_json: options.Json = False) -> None:
    """List the models that need no download, by name.

    Example: tl-edgeprune models
    """
    from tl_edgeprune import models as known

    footer = "So are folders that save_pretrained wrote, and names of the Hugging Face hub."
    _show(known.list(), footer, as_json)


@with_error_messages
def methods(as_json: options.Json = False) -> None:
    """List the methods that discover and compare take.

    Example: tl-edgeprune methods
    """
    from tl_edgeprune.methods.registry import METHODS

    footer = "Their settings go by --set NAME=VALUE: tl-edgeprune discover --help."
    _show(tuple(METHODS), footer, as_json)


@with_error_messages
def ablations(as_json: options.Json = False) -> None:
    """List the ablations: what removed edges carry.

    Example: tl-edgeprune ablations
    """
    from tl_edgeprune.ablation.kinds import ABLATIONS

    if as_json:
        print(json.dumps([*ABLATIONS]))
        return
    for name, ablation in ABLATIONS.items():
        print(f"{name:17} {ablation.help}")
    print("\nLearned constants are a file: --ablation constants.safetensors.")


def _show(names: tuple[str, ...], further: str, as_json: bool) -> None:
    print(json.dumps(names) if as_json else "\n".join([*names, "", further]))
