"""Subject-verb agreement: the verb has the subject's number, whatever noun is in between.

    Look: the keys near the door   -> are, were, have, not is, was, has

1. A prompt is a subject, a preposition and another noun; each noun is singular or plural. Several
   verbs are right, so the answers are sets of tokens.
2. The corrupted prompt has the same subject in the other number. Subjects are nouns with as many
   tokens in the singular as in the plural.
"""

from __future__ import annotations

import math
import random

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, mixed_radix, register_recipe
from tl_edgeprune.tasks.single_tokens import pieces

NOUNS = tuple(  # their plural ends in s
    "key boy girl car dog cat targets farmer painter lamp table book letter picture pilot doctor "
    "driver singer tree river bottle chair window door phone ticket bridge tower king lion horse "
    "robot student lawyer writer player guard uncle cousin sister".split()
)
PREPOSITIONS = ("near", "behind", "beside", "in front of", "next to", "across from")
VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"))
NUMBERS = ("singular", "plural")


@register_recipe("subject-verb-agreement")
def subject_verb_agreement(tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """Raises ValueError if the tokenizer has no suitable verb or subject."""
    verbs, subjects = verb_tokens(tokenizer), exchangeable(tokenizer)
    sizes = len(subjects), 2, len(NOUNS) - 1, 2, len(PREPOSITIONS)

    def make(number: int, generator: random.Random) -> Example:
        subject, its_number, attractor, other_number, preposition = mixed_radix(number, sizes)
        noun = subjects[subject]
        other_nouns = [word for word in NOUNS if word != noun]
        other_noun = inflected(other_nouns[attractor], other_number)
        phrase = f"{PREPOSITIONS[preposition]} the {other_noun}"
        clean, corrupted = (
            f"Look: the {inflected(noun, n)} {phrase}" for n in (its_number, 1 - its_number)
        )
        return Example(
            f"{NUMBERS[its_number]}-{NUMBERS[other_number]}",
            clean,
            corrupted,
            right=verbs[its_number],
            wrong=verbs[1 - its_number],
        )

    limit = f"{len(subjects)} subjects have as many tokens in both numbers"
    return Recipe(math.prod(sizes), make, limit)


def inflected(noun: str, number: int) -> str:
    return f"{noun}s" if number else noun


def verb_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Singular and plural verbs that are one token each, in pairs."""
    tokens = pieces(tokenizer, [verb for pair in VERBS for verb in pair], "Look: the keys")
    pairs = [
        (tokens[singular_verb][0], tokens[plural_verb][0])
        for singular_verb, plural_verb in VERBS
        if len(tokens.get(singular_verb, ())) == len(tokens.get(plural_verb, ())) == 1
    ]
    if not pairs:
        raise ValueError(
            "subject-verb-agreement needs a verb of one token in both numbers, and this tokenizer "
            f"splits all of {', '.join('/'.join(pair) for pair in VERBS)}."
        )
    singular, plural = zip(*pairs, strict=True)
    return singular, plural


def exchangeable(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The nouns with as many tokens in the singular as in the plural."""
    written = pieces(tokenizer, [inflected(noun, n) for noun in NOUNS for n in (0, 1)])
    nouns = [noun for noun in NOUNS if {noun, f"{noun}s"} <= written.keys()]
    exchangeable_nouns = [noun for noun in nouns if len(written[noun]) == len(written[f"{noun}s"])]
    if not exchangeable_nouns:
        raise ValueError(
            "subject-verb-agreement needs nouns of as many tokens in the singular as in the "
            "plural, and this tokenizer has none."
        )
    return exchangeable_nouns
