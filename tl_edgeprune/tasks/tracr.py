"""Prompts for the compiled programs of `models`: BOS and one to five tokens, lengths mixed.

Every position but BOS is read, and the objective is the mean squared error, since logits are the
program's output itself. The corrupted prompt is another prompt of the same length. Each token is a
span: BOS, t1, t2, …
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tl_edgeprune.models import tracr
from tl_edgeprune.tasks.registry import register
from tl_edgeprune.tasks.task import Task

Prompt = tuple[int, ...]


@register("tracr-xproportion")
def load_xproportion(model: nn.Module, n: int, seed: int, prepend_bos: bool | None) -> Task:
    return build("tracr-xproportion", model, n, seed, prepend_bos)


@register("tracr-reverse")
def load_reverse(model: nn.Module, n: int, seed: int, prepend_bos: bool | None) -> Task:
    """Its logits' columns are tokens, so it has answers too: the prompt in reverse."""
    task = build("tracr-reverse", model, n, seed, prepend_bos)
    answers = tuple(tokens[1:].flip(0) for tokens in task.clean)
    return Task(**vars(task) | {"answers": answers})


def build(name: str, model: nn.Module, n: int, seed: int, prepend_bos: bool | None) -> Task:
    """n pairs; all prompts come before any comes again, and then with another corrupted prompt.

    Raises:
        ValueError: the model has another vocabulary, or prepend_bos is False.
    """
    config = tracr.read_config(name)
    _check_model(name, model, config, prepend_bos)
    by_length = _prompts(config, random.Random(seed))
    clean, corrupted = zip(*itertools.islice(_pairs(by_length), n), strict=True)
    return Task(
        name,
        clean=[torch.tensor(prompt) for prompt in clean],
        corrupted=[torch.tensor(prompt) for prompt in corrupted],
        positions=[torch.arange(1, len(prompt)) for prompt in clean],
        objective="mse",
        prepend_bos=True,
        groups=tuple(f"length-{len(prompt) - 1}" for prompt in clean),
        span_names=("BOS", *(f"t{place}" for place in range(1, config["model"]["n_ctx"]))),
        spans=[torch.arange(len(prompt)) for prompt in clean],
    )


def _prompts(config: dict[str, Any], generator: random.Random) -> list[list[Prompt]]:
    """All prompts of each length, shuffled."""
    lengths = range(1, config["model"]["n_ctx"])
    by_length = [
        [(config["bos"], *rest) for rest in itertools.product(config["tokens"], repeat=length)]
        for length in lengths
    ]
    return [generator.sample(prompts, len(prompts)) for prompts in by_length]


def _pairs(by_length: list[list[Prompt]]) -> Iterator[tuple[Prompt, Prompt]]:
    """Endless pairs: lengths take turns, and each round shifts the corrupted prompt by one."""
    for round_ in itertools.count(1):
        for place in range(max(map(len, by_length))):
            for prompts in by_length:
                if place < len(prompts):
                    shift = 1 + (round_ - 1) % (len(prompts) - 1)  # never the prompt itself
                    yield prompts[place], prompts[(place + shift) % len(prompts)]


def _check_model(
    name: str, model: nn.Module, config: dict[str, Any], prepend_bos: bool | None
) -> None:
    for size in ("d_vocab", "d_vocab_out", "n_ctx"):
        found = getattr(getattr(model, "cfg", None), size, None)
        if found != config["model"][size]:
            raise ValueError(
                f"tasks.load({name!r}): the model has {size}={found}, the task is for "
                f"{size}={config['model'][size]}: use models.load({name!r})."
            )
    if prepend_bos is False:
        raise ValueError(f"tasks.load({name!r}): the program needs BOS, so prepend_bos is True.")
