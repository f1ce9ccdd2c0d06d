"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593).

    Then, Mary and John went to the store. John gave a drink to        -> Mary, not John

1. A prompt has a sentence, an order of the first two names (ABBA or BABA: A is the answer, B is
   repeated), two names, a place and an object. All combinations are numbered, and n numbers are
   drawn without repetition. So clean prompts differ, and their number is known.
2. The corrupted prompt has three other, different names in the three name slots, as in ACDC and
   Edge Pruning: nothing in it determines the answer.
3. Only names that are one token in context are used, so both prompts have the same length.
4. Spans are those of Wang et al.: IO, S1, S1+1 (the token after S1), S2, END, and rest.

`ioi` mixes all sentences and both orders; `ioi-t1` has one sentence in one order.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, mixed_radix, register_recipe
from tl_edgeprune.tasks.single_tokens import single_tokens
from tl_edgeprune.tasks.tokens import Part, filled

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
SPANS = ("IO", "S1", "S2")  # the answer's name, and both mentions of the subject
NAMES_NEEDED = 5  # two clean, three corrupted


class Template(NamedTuple):
    """A sentence and the order of its names."""

    label: str
    sentence: str
    order: str


class Choice(NamedTuple):
    """The choices that define one clean prompt."""

    template: Template
    answer: str
    subject: str
    place: str
    object: str

    def text(self, names: tuple[str, str, str]) -> tuple[str, tuple[Part, ...]]:
        """The prompt with these names, and the spans of the clean prompt."""
        slots = dict(zip("012", names, strict=True))
        text, fields = filled(self.template.sentence, **slots, place=self.place, object=self.object)
        spans = [span for slot in slots for span in fields[slot]]
        if self.template.order == "BABA":
            spans[:2] = reversed(spans[:2])
        io, s1, s2 = (span._replace(name=n) for span, n in zip(spans, SPANS, strict=True))
        return text, (io, s1, Part("S1+1", s1.end + 1, s1.end + 2), s2)

    def names(self) -> tuple[str, str, str]:
        people = {"A": self.answer, "B": self.subject}
        first, second, third = (people[slot] for slot in self.template.order[:3])
        return first, second, third


TEMPLATES = tuple(
    Template(f"{order}-{number:02}", sentence, order)
    for number, sentence in enumerate(SENTENCES)
    for order in ORDERS
)


@register_recipe("ioi")
def ioi(tokenizer: PreTrainedTokenizerBase) -> Recipe:
    return recipe(tokenizer, TEMPLATES)


@register_recipe("ioi-t1")
def ioi_t1(tokenizer: PreTrainedTokenizerBase) -> Recipe:
    return recipe(tokenizer, TEMPLATES[:1])


def recipe(tokenizer: PreTrainedTokenizerBase, templates: tuple[Template, ...]) -> Recipe:
    """IOI over the given templates.

    Raises:
        ValueError: the tokenizer splits too many of the names.
    """
    names = single_token_names(tokenizer)
    sizes = len(templates), len(names), len(names) - 1, len(PLACES), len(OBJECTS)

    def make(number: int, generator: random.Random) -> Example:
        template, answer, subject, place_index, gift = mixed_radix(number, sizes)
        other_names = names[:answer] + names[answer + 1 :]
        people = (names[answer], other_names[subject])
        choice = Choice(templates[template], *people, PLACES[place_index], OBJECTS[gift])
        strangers = [name for name in names if name not in people]
        first, second, third = generator.sample(strangers, 3)
        clean, parts = choice.text(choice.names())
        return Example(
            choice.template.label,
            clean,
            choice.text((first, second, third))[0],
            answer=f" {choice.answer}",
            distractor=f" {choice.subject}",
            parts=parts,
        )

    return Recipe(math.prod(sizes), make, f"{len(names)} names are one token each")


def single_token_names(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The names that are one token after a space in a sentence.

    Raises:
        ValueError: fewer than five, with the names that the tokenizer splits.
    """
    prompt = "Then, they gave a drink to"
    return tuple(single_tokens(tokenizer, NAMES, NAMES_NEEDED, "IOI's names", prompt))
