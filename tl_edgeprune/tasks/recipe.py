"""Tasks generated as text: numbered prompts, drawn without repetition, for any tokenizer.

1. A recipe numbers its clean prompts. A task draws n numbers without repetition, and a stream reads
   them in a shuffled order. So clean prompts differ, and their number is known.
2. A number, with a random generator for the rest (the corrupted prompt, fillers), gives an Example:
   two texts, and the answer and a distractor as they follow the clean text.
3. Answers are tokenised in context. Tokens with which both answer and distractor begin, such as a
   separate space, move to the end of both prompts; the next token distinguishes them.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.permutation import Order
from tl_edgeprune.tasks.registry import register, register_stream
from tl_edgeprune.tasks.stream import TaskStream
from tl_edgeprune.tasks.task import Task, lay_out_spans
from tl_edgeprune.tasks.tokens import (
    Part,
    answer_in_context,
    encode,
    encode_parts,
    resolve_prepend_bos,
    tokenizer_of,
)


class Example(NamedTuple):
    """One pair as text, read at the last token of its prompts.

    Args:
        group: the label of its template.
        clean, corrupted: the prompts.
        answer, distractor: as they follow the clean prompt, with their space; None if only sets of
            tokens are right and wrong.
        right, wrong: those sets, as token ids; with an answer, only `wrong`: all tokens that it
            must beat.
        parts: named parts of the clean prompt, at the same tokens in the corrupted prompt: the
            task's spans, with "END" for the last token and "rest" for unnamed tokens.
    """

    group: str
    clean: str
    corrupted: str
    answer: str | None = None
    distractor: str | None = None
    right: tuple[int, ...] = ()
    wrong: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """How a task's pairs are generated for one tokenizer.

    Args:
        count: how many different clean prompts there are.
        make: the example of a number below `count`; equal numbers give equal clean prompts, up to
            fillers, and different numbers different ones.
        limit: what limits the count, for the error if more are requested.
    """

    count: int
    make: Callable[[int, random.Random], Example]
    limit: str


RecipeMaker = Callable[..., Recipe]


def register_recipe(name: str) -> Callable[[RecipeMaker], RecipeMaker]:
    """Decorator: make `recipe(tokenizer, *, options…)` known to `load` and `stream` as `name`."""

    def add(recipe: RecipeMaker) -> RecipeMaker:
        @functools.wraps(recipe)
        def load(model: Any, n: int, seed: int, prepend_bos: Any, **options: Any) -> Task:
            recipe_of_model = recipe(tokenizer_of(model), **options)
            return build(name, recipe_of_model, model, n, seed, prepend_bos)

        @functools.wraps(recipe)
        def stream(model: Any, n: int, seed: int, prepend_bos: Any, **options: Any) -> TaskStream:
            recipe_of_model = recipe(tokenizer_of(model), **options)
            return build_stream(name, recipe_of_model, model, n, seed, prepend_bos)

        register(name)(load)
        register_stream(name)(stream)
        return recipe

    return add


def build(
    name: str, recipe: Recipe, model: nn.Module, n: int, seed: int, prepend_bos: bool | None
) -> Task:
    """n pairs of a recipe, with different clean prompts.

    Raises:
        ValueError: the model has no tokenizer, or n exceeds the recipe's number of prompts.
    """
    _check_possible(f"tasks.load({name!r}, n={n})", n, recipe)
    tokenizer, prepend_bos = tokenizer_of(model), resolve_prepend_bos(model, prepend_bos)
    generator = random.Random(seed)
    numbers = generator.sample(range(recipe.count), n)
    examples = [recipe.make(number, generator) for number in numbers]
    return task_of(name, examples, tokenizer, prepend_bos)


def build_stream(
    name: str, recipe: Recipe, model: nn.Module, n: int, seed: int, prepend_bos: bool | None
) -> TaskStream:
    """A recipe's pairs on demand, each from the seed and its index, with different clean prompts.

    Raises ValueError as `build` does.
    """
    _check_possible(f"tasks.stream({name!r}, n={n})", n, recipe)
    tokenizer, prepend_bos = tokenizer_of(model), resolve_prepend_bos(model, prepend_bos)
    numbers = Order(recipe.count, seed)

    def example(index: int) -> Example:
        return recipe.make(numbers[index], random.Random(f"{seed} {index}"))

    def read(indices: range) -> Task:
        return task_of(name, [example(index) for index in indices], tokenizer, prepend_bos)

    about = (name, n, seed, prepend_bos, recipe.count, len(tokenizer), example(0), example(n - 1))
    return TaskStream(name, n, read, identity=repr(about), prepend_bos=prepend_bos)


def task_of(
    name: str,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prepend_bos: bool,
) -> Task:
    """Examples as token ids."""
    rows, marked = zip(
        *(encode_example(tokenizer, example, prepend_bos) for example in examples), strict=True
    )
    fields: dict[str, Any] = {field: [row[field] for row in rows] for field in rows[0]}
    fields |= lay_out_spans(marked, [*map(len, fields["clean"])])
    groups = tuple(example.group for example in examples)
    return Task(name, **fields, prepend_bos=prepend_bos, groups=groups)


def encode_example(
    tokenizer: PreTrainedTokenizerBase, example: Example, prepend_bos: bool
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """An example's token ids, by a Task's fields, and its parts as ranges of tokens."""
    shared, answer, distractor = _distinguishing_tokens(tokenizer, example)
    clean, spans = encode_parts(tokenizer, example.clean, prepend_bos, example.parts)
    clean += shared
    if spans:
        spans = {"END": (len(clean) - 1, len(clean))} | spans
    fields = {
        "clean": clean,
        "corrupted": encode(tokenizer, example.corrupted, prepend_bos) + shared,
        "read_positions": [len(clean) - 1],
        "answers": answer,
        "distractors": distractor,
        "right": answer if answer and example.wrong else example.right,
        "wrong": example.wrong,
    }
    tensors = {field: torch.tensor(tokens, dtype=torch.long) for field, tokens in fields.items()}
    return tensors, spans


def mixed_radix(number: int, sizes: Sequence[int]) -> list[int]:
    """The digits of a number, the first one below sizes[0], and so on."""
    digits = []
    for size in sizes:
        number, digit = divmod(number, size)
        digits.append(digit)
    return digits


def _distinguishing_tokens(
    tokenizer: PreTrainedTokenizerBase, example: Example
) -> tuple[list[int], list[int], list[int]]:
    """The tokens with which answer and distractor both begin, and the next token of each."""
    if example.answer is None or example.distractor is None:
        return [], [], []
    answer, distractor = (
        answer_in_context(tokenizer, example.clean, text)
        for text in (example.answer, example.distractor)
    )
    n_shared = 0
    while n_shared < min(len(answer), len(distractor)) and answer[n_shared] == distractor[n_shared]:
        n_shared += 1
    if n_shared == min(len(answer), len(distractor)):
        raise ValueError(
            f"answer {example.answer!r} and distractor {example.distractor!r} have no token that "
            f"distinguishes them: they are {answer} and {distractor}."
        )
    return answer[:n_shared], [answer[n_shared]], [distractor[n_shared]]


def _check_possible(call: str, n: int, recipe: Recipe) -> None:
    if n > recipe.count:
        raise ValueError(
            f"{call}: only {recipe.count:,} different prompts can be made ({recipe.limit}): ask "
            "for at most that many."
        )
