"""Prompts for compiled programs (models/tracr.py): BOS and tokens, of mixed lengths.

Every position except BOS is read. The objective is the mean squared error, since logits are the
program's output. The corrupted prompt is another prompt of the same length. Each token is a span:
BOS, t1, t2, …
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from tl_edgeprune.models import tracr
from tl_edgeprune.tasks.registry import check_model_sizes, register
from tl_edgeprune.tasks.task import Task

Prompt = tuple[int, ...]
MOST = 4096  # prompts of one length, at most


@register("tracr")
def load_program(model: nn.Module, n: int, seed: int, prepend_bos: bool | None) -> Task:
    """Prompts for a compiled program of any kind."""
    config = tracr.config_of(model)
    if config is None:
        raise ValueError(
            f"tasks.load('tracr'): {type(model).__name__} is not a compiled program: make one with "
            "models.from_tracr, or load one of " + ", ".join(tracr.NAMES) + "."
        )
    return build(config, n, seed, prepend_bos)


def load_shipped(name: str, model: nn.Module, n: int, seed: int, prepend_bos: bool | None) -> Task:
    """Prompts for a shipped program."""
    config = tracr.read_config(name)
    sizes = {size: config["model"][size] for size in ("d_vocab", "d_vocab_out", "n_ctx")}
    check_model_sizes(name, model, sizes)
    task = build(config, n, seed, prepend_bos)
    if name != "tracr-reverse":
        return task
    # Its logits' columns are tokens, so it has answers too: the prompt in reverse.
    answers = tuple(tokens[1:].flip(0) for tokens in task.clean)
    return Task(**vars(task) | {"answers": answers})


for _name in tracr.NAMES:
    register(_name)(partial(load_shipped, _name))


def build(config: dict[str, Any], n: int, seed: int, prepend_bos: bool | None) -> Task:
    """n pairs; all prompts occur before any is repeated, then with another corrupted prompt.

    If a length has more than `MOST` prompts, `MOST` of them are drawn. Raises ValueError if
    prepend_bos is False.
    """
    if prepend_bos is False:
        raise ValueError(
            f"tasks.load({config['name']!r}): the program needs BOS, so prepend_bos must be True."
        )
    by_length = _prompts(config, random.Random(seed))
    clean, corrupted = zip(*itertools.islice(_pairs(by_length), n), strict=True)
    return Task(
        config["name"],
        clean=[torch.tensor(prompt) for prompt in clean],
        corrupted=[torch.tensor(prompt) for prompt in corrupted],
        read_positions=[torch.arange(1, len(prompt)) for prompt in clean],
        objective="mse",
        prepend_bos=True,
        groups=tuple(f"length-{len(prompt) - 1}" for prompt in clean),
        span_names=("BOS", *(f"t{index}" for index in range(1, config["model"]["n_ctx"]))),
        spans=[torch.arange(len(prompt)) for prompt in clean],
    )


def _prompts(config: dict[str, Any], generator: random.Random) -> list[list[Prompt]]:
    """The prompts of each length, all of them or `MOST`, shuffled."""
    tokens, prompts_by_length = config["tokens"], []
    for length in range(1, config["model"]["n_ctx"]):
        total = len(tokens) ** length
        numbers = generator.sample(range(total), min(total, MOST))
        prompts_by_length.append([(config["bos"], *_written(n, tokens, length)) for n in numbers])
    return prompts_by_length


def _written(number: int, tokens: list[int], length: int) -> Prompt:
    """A number in base len(tokens), as `length` digits."""
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(tokens))
        digits.append(tokens[digit])
    return tuple(reversed(digits))


def _pairs(by_length: list[list[Prompt]]) -> Iterator[tuple[Prompt, Prompt]]:
    """Endless pairs: lengths alternate, and each round shifts the corrupted prompt by one."""
    for round_ in itertools.count(1):
        for index in range(max(map(len, by_length))):
            for prompts in by_length:
                if index < len(prompts):
                    shift = 1 + (round_ - 1) % (len(prompts) - 1)  # never the prompt itself
                    yield prompts[index], prompts[(index + shift) % len(prompts)]
