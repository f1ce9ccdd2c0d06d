"""Multiple choice with letters, as in the MIB benchmark (Mueller et al. 2025).

    The coat is green. Which colour is the coat?
    A. red
    B. green
    C. black
    D. white
    Answer:                -> B, not D

The corrupted prompt has the same choices, rotated by a random number of lines, so that another
letter is right: it is the distractor. The answer must beat every other letter.
"""

from __future__ import annotations

import math
import random
from string import ascii_uppercase

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, mixed_radix, register_recipe
from tl_edgeprune.tasks.single_tokens import single_tokens

SENTENCES = (
    "The {thing} is {colour}. Which colour is the {thing}?",
    "Someone has a {colour} {thing}. What is the colour of the {thing}?",
    "There is a {thing} on the table, and it is {colour}. Which colour does the {thing} have?",
)
THINGS = tuple(
    "coat cup hat box book pen bag ball shirt car chair door lamp plate bottle ribbon ring towel "
    "blanket basket button candle scarf clock".split()
)
COLOURS = tuple("red green blue black white yellow brown grey pink purple orange silver".split())


@register_recipe("mcqa")
def mcqa(tokenizer: PreTrainedTokenizerBase, *, choices: int = 4) -> Recipe:
    """Questions with `choices` choices.

    Raises ValueError for fewer than 2 choices or more than colours, or if a letter is split.
    """
    if not 2 <= choices <= len(COLOURS):
        raise ValueError(f"mcqa: choices={choices}, expected 2 to {len(COLOURS)}.")
    letters = ascii_uppercase[:choices]
    tokens = single_tokens(tokenizer, letters, choices, "mcqa's letters", "Answer:")
    sizes = choices, len(SENTENCES), len(THINGS), len(COLOURS)

    def make(number: int, generator: random.Random) -> Example:
        position, sentence, thing_index, colour_index = mixed_radix(number, sizes)
        other_colours = [*COLOURS[:colour_index], *COLOURS[colour_index + 1 :]]
        listed = generator.sample(other_colours, choices - 1)
        listed.insert(position, COLOURS[colour_index])
        shift = generator.randrange(1, choices)
        moved = [listed[(i - shift) % choices] for i in range(choices)]
        thing, colour = THINGS[thing_index], COLOURS[colour_index]
        question = SENTENCES[sentence].format(thing=thing, colour=colour)
        answer, distractor = letters[position], letters[(position + shift) % choices]
        return Example(
            f"sentence-{sentence}",
            written(question, listed),
            written(question, moved),
            answer=f" {answer}",
            distractor=f" {distractor}",
            wrong=tuple(token for letter, token in tokens.items() if letter != answer),
        )

    return Recipe(math.prod(sizes), make, f"{len(THINGS)} things in {len(COLOURS)} colours")


def written(question: str, listed: list[str]) -> str:
    choices = [f"{letter}. {c}" for letter, c in zip(ascii_uppercase, listed, strict=False)]
    return "\n".join([question, *choices, "Answer:"])
