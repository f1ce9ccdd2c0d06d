"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593).

    Then, Mary and John went to the store. John gave a drink to        -> Mary, not John

1. A prompt is a sentence, an order of the first two names (ABBA or BABA: A is the answer, B
   comes again), two names, a place and an object. All combinations are numbered, and n numbers
   are drawn without repetition: so clean prompts differ, and what can be made is known.
2. The corrupted prompt has three other names, all different, in the three name slots, as in ACDC
   and Edge Pruning: nothing in it says who the answer is.
3. Only names that are one token in context are used, so both prompts have the same length.

`ioi` mixes all sentences and both orders; `ioi-t1` has one sentence in one order.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.order import Order
from tl_edgeprune.tasks.registry import register, register_stream
from tl_edgeprune.tasks.stream import TaskStream
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.tasks.tokens import (
    answer_in_context,
    encode,
    resolve_prepend_bos,
    tokenizer_of,
)

SENTENCES = (  # a language model of 135 M parameters does the task on each of them, in both orders
    "Then, {0} and {1} went to the {place}. {2} gave a {object} to",
    "Then, {0} and {1} had a lot of fun at the {place}. {2} gave a {object} to",
    "Then, {0} and {1} were working at the {place}. {2} handed a {object} to",
    "When {0} and {1} arrived at the {place}, {2} handed a {object} to",
    "While {0} and {1} were waiting at the {place}, {2} gave a {object} to",
    "While {0} and {1} were sitting in the {place}, {2} passed a {object} to",
    "After {0} and {1} went to the {place}, {2} gave a {object} to",
    "As soon as {0} and {1} got to the {place}, {2} took a {object} and gave it to",
    "The friends {0} and {1} found a {object} at the {place}. {2} gave it to",
    "The neighbours {0} and {1} bought a {object} at the {place}. {2} gave it to",
    "Yesterday {0} and {1} met at the {place}, and {2} gave a {object} to",
    "In the evening {0} and {1} walked to the {place}. There {2} gave a {object} to",
    "This afternoon {0} and {1} visited the {place}. {2} showed a {object} to",
    "On Sunday {0} and {1} were at the {place}. {2} offered a {object} to",
    "One day {0} and {1} went to the {place} together. {2} handed a {object} to",
)
PLACES = ("store", "garden", "school", "restaurant", "hospital", "office", "library", "station")
OBJECTS = ("drink", "book", "ring", "ticket", "necklace", "basketball", "flower", "computer")
NAMES = tuple(
    "Aaron Adam Alan Alex Alice Amy Andrew Andy Anna Anthony Arthur Barbara Brian Carol Charles "
    "Charlie Christopher Daniel David Diana Edward Elizabeth Emily Emma Eric Eva George Grace "
    "Hannah Helen Henry Ian Jack Jacob Jake James Jamie Jane Jason Jennifer Jeremy Jessica John "
    "Jonathan Joseph Joshua Julia Justin Karen Kate Kevin Laura Linda Lisa Louis Lucy Luke Maria "
    "Mark Martin Mary Matthew Michael Michelle Nancy Nicole Oliver Patrick Paul Peter Rachel "
    "Rebecca Richard Robert Ruth Ryan Sarah Sean Simon Sophie Stephen Steven Susan Thomas Tom "
    "Victoria William".split()
)
ORDERS = ("ABBA", "BABA")
NAMES_NEEDED = 5  # two clean, three corrupted


class Template(NamedTuple):
    """A sentence and the order of its names."""

    label: str
    sentence: str
    order: str


class Choice(NamedTuple):
    """One clean prompt: everything that is chosen in it."""

    template: Template
    answer: str
    subject: str
    place: str
    object: str

    def text(self, names: tuple[str, str, str]) -> str:
        return self.template.sentence.format(*names, place=self.place, object=self.object)

    def names(self) -> tuple[str, str, str]:
        people = {"A": self.answer, "B": self.subject}
        first, second, third = (people[slot] for slot in self.template.order[:3])
        return first, second, third


TEMPLATES = tuple(
    Template(f"{order}-{number:02}", sentence, order)
    for number, sentence in enumerate(SENTENCES)
    for order in ORDERS
)


@register("ioi")
def load_ioi(model: nn.Module, n: int, seed: int, prepend_bos: bool | None) -> Task:
    return build("ioi", TEMPLATES, model, n, seed, prepend_bos)


@register("ioi-t1")
def load_ioi_t1(model: nn.Module, n: int, seed: int, prepend_bos: bool | None) -> Task:
    return build("ioi-t1", TEMPLATES[:1], model, n, seed, prepend_bos)


@register_stream("ioi")
def stream_ioi(model: nn.Module, n: int, seed: int, prepend_bos: bool | None) -> TaskStream:
    return build_stream("ioi", TEMPLATES, model, n, seed, prepend_bos)


@register_stream("ioi-t1")
def stream_ioi_t1(model: nn.Module, n: int, seed: int, prepend_bos: bool | None) -> TaskStream:
    return build_stream("ioi-t1", TEMPLATES[:1], model, n, seed, prepend_bos)


def build(
    name: str,
    templates: tuple[Template, ...],
    model: nn.Module,
    n: int,
    seed: int,
    prepend_bos: bool | None,
) -> Task:
    """An IOI task of n pairs over the given templates.

    Raises:
        ValueError: the model has no tokenizer, the tokenizer splits all but a few names, or n
            exceeds the number of different clean prompts.
    """
    tokenizer, prepend_bos = tokenizer_of(model), resolve_prepend_bos(model, prepend_bos)
    names = single_token_names(tokenizer)
    generator = random.Random(seed)
    choices = draw(name, templates, names, n, generator)
    rows = [_tokens(tokenizer, choice, names, generator, prepend_bos) for choice in choices]
    return _task(name, choices, rows, prepend_bos)


def build_stream(
    name: str,
    templates: tuple[Template, ...],
    model: nn.Module,
    n: int,
    seed: int,
    prepend_bos: bool | None,
) -> TaskStream:
    """IOI pairs made on demand: each from the seed and its place, clean prompts all different.

    Raises ValueError as `build` does.
    """
    tokenizer, prepend_bos = tokenizer_of(model), resolve_prepend_bos(model, prepend_bos)
    names = single_token_names(tokenizer)
    sizes = _sizes(templates, names)
    _check_possible(f"tasks.stream({name!r}, n={n})", n, sizes, names)
    numbers = Order(math.prod(sizes), seed)

    def read(places: range) -> Task:
        choices = [_choice(numbers[place], sizes, templates, names) for place in places]
        rows = [
            _tokens(tokenizer, choice, names, random.Random(f"{seed} {place}"), prepend_bos)
            for place, choice in zip(places, choices, strict=True)
        ]
        return _task(name, choices, rows, prepend_bos)

    about = (name, n, seed, prepend_bos, names, [t.label for t in templates], len(tokenizer))
    return TaskStream(name, n, read, identity=repr(about), prepend_bos=prepend_bos)


def _task(
    name: str, choices: list[Choice], rows: list[tuple[torch.Tensor, ...]], prepend_bos: bool
) -> Task:
    clean, corrupted, answers, distractors = zip(*rows, strict=True)
    return Task(
        name,
        clean,
        corrupted,
        positions=[torch.tensor([len(tokens) - 1]) for tokens in clean],
        answers=answers,
        distractors=distractors,
        prepend_bos=prepend_bos,
        groups=tuple(choice.template.label for choice in choices),
    )


def single_token_names(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The names that are one token after a space in a sentence.

    Raises:
        ValueError: fewer than five, with the names that the tokenizer splits.
    """
    prompt = "Then, they gave a drink to"
    single = tuple(n for n in NAMES if len(answer_in_context(tokenizer, prompt, f" {n}")) == 1)
    if len(single) < NAMES_NEEDED:
        split = ", ".join(name for name in NAMES if name not in single)
        raise ValueError(
            f"IOI needs {NAMES_NEEDED} names of one token each, and this tokenizer has "
            f"{len(single)}; it splits {split}."
        )
    return single


def draw(
    name: str,
    templates: tuple[Template, ...],
    names: tuple[str, ...],
    n: int,
    generator: random.Random,
) -> list[Choice]:
    """n different clean prompts: numbers drawn without repetition, each read in mixed radix."""
    sizes = _sizes(templates, names)
    _check_possible(f"tasks.load({name!r}, n={n})", n, sizes, names)
    numbers = generator.sample(range(math.prod(sizes)), n)
    return [_choice(number, sizes, templates, names) for number in numbers]


def _sizes(templates: tuple[Template, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """How many there are to choose from, for each part of a prompt."""
    return len(templates), len(names), len(names) - 1, len(PLACES), len(OBJECTS)


def _check_possible(call: str, n: int, sizes: tuple[int, ...], names: tuple[str, ...]) -> None:
    possible = math.prod(sizes)
    if n > possible:
        raise ValueError(
            f"{call}: only {possible:,} different prompts can be made "
            f"({len(names)} names are one token each): ask for at most that many."
        )


def _choice(
    number: int, sizes: tuple[int, ...], templates: tuple[Template, ...], names: tuple[str, ...]
) -> Choice:
    digits = []
    for size in sizes:
        number, digit = divmod(number, size)
        digits.append(digit)
    template, answer, subject, place, gift = digits
    others = names[:answer] + names[answer + 1 :]
    people = (names[answer], others[subject])
    return Choice(templates[template], *people, PLACES[place], OBJECTS[gift])


def _tokens(
    tokenizer: PreTrainedTokenizerBase,
    choice: Choice,
    names: tuple[str, ...],
    generator: random.Random,
    prepend_bos: bool,
) -> tuple[torch.Tensor, ...]:
    """Clean prompt, corrupted prompt, answer and distractor of one pair."""
    others = [name for name in names if name not in (choice.answer, choice.subject)]
    first, second, third = generator.sample(others, 3)
    clean, corrupted = choice.text(choice.names()), choice.text((first, second, third))
    return (
        torch.tensor(encode(tokenizer, clean, prepend_bos)),
        torch.tensor(encode(tokenizer, corrupted, prepend_bos)),
        torch.tensor(answer_in_context(tokenizer, clean, f" {choice.answer}")),
        torch.tensor(answer_in_context(tokenizer, clean, f" {choice.subject}")),
    )
