"""Gendered pronouns (Mathwin et al. 2023): a name decides between "he" and "she".

    I think that Mary is a kind targets, isn't -> she, not he

The corrupted prompt has a name of the other gender with as many tokens. Spans: name, adjective,
noun, END, and rest.
"""

from __future__ import annotations

import math
import random

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, mixed_radix, register_recipe
from tl_edgeprune.tasks.single_tokens import by_length
from tl_edgeprune.tasks.tokens import filled

SENTENCES = (
    "I think that {name} is a {adjective} {noun}, isn't",
    "We all know that {name} is a {adjective} {noun}, isn't",
    "As you said, {name} is such a {adjective} {noun}, isn't",
    "Last year {name} was a {adjective} {noun}, wasn't",
)
GIRLS = tuple(
    "Alice Amy Anna Barbara Carol Diana Elizabeth Emily Emma Grace Hannah Helen Jane Jennifer "
    "Jessica Julia Karen Kate Laura Linda Lisa Lucy Maria Mary Michelle Nancy Nicole Rachel "
    "Rebecca Ruth Sarah Sophie Susan Victoria".split()
)
BOYS = tuple(
    "Aaron Adam Andrew Anthony Arthur Brian Charles Christopher Daniel David Edward Eric George "
    "Henry Jack Jacob James Jason Jeremy John Jonathan Joseph Joshua Kevin Luke Mark Martin "
    "Matthew Michael Oliver Patrick Paul Peter Richard Robert Ryan Simon Stephen Steven Thomas "
    "Tom William".split()
)
PRONOUNS = {"she": GIRLS, "he": BOYS}
ADJECTIVES = ("good", "kind", "great", "clever", "brave", "funny", "careful", "patient", "bright")
NOUNS = tuple(
    "targets doctor friend singer writer student driver painter lawyer swimmer neighbour cook "
    "reader player gardener runner speaker scientist".split()
)


@register_recipe("gendered-pronoun")
def gendered_pronoun(tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """Raises ValueError if no name of the other gender has as many tokens as any name."""
    people = pairs_of_names(tokenizer)
    sizes = len(SENTENCES), len(ADJECTIVES), len(NOUNS), len(people)

    def make(number: int, generator: random.Random) -> Example:
        sentence, adjective, noun, person = mixed_radix(number, sizes)
        name, pronoun, replacements = people[person]
        words = {"adjective": ADJECTIVES[adjective], "noun": NOUNS[noun]}
        (clean, clean_spans), (corrupted, _) = (
            filled(SENTENCES[sentence], name=who, **words)
            for who in (name, generator.choice(replacements))
        )
        distractor = "he" if pronoun == "she" else "she"
        spans = (clean_spans["name"][0], clean_spans["adjective"][0], clean_spans["noun"][0])
        return Example(
            f"{pronoun}-{sentence}", clean, corrupted, f" {pronoun}", f" {distractor}", parts=spans
        )

    return Recipe(math.prod(sizes), make, f"{len(people)} names can be exchanged for others")


def pairs_of_names(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str, list[str]]]:
    """Names with their pronoun and the names of the other gender that have as many tokens."""
    girls, boys = (by_length(tokenizer, PRONOUNS[pronoun]) for pronoun in ("she", "he"))
    people = [
        (name, pronoun, other_gender[n_tokens])
        for pronoun, same_gender, other_gender in (("she", girls, boys), ("he", boys, girls))
        for n_tokens, names in same_gender.items()
        if n_tokens in other_gender
        for name in names
    ]
    if not people:
        raise ValueError(
            "gendered-pronoun needs a girl's and a boy's name with as many tokens, and this "
            "tokenizer has none."
        )
    return people
