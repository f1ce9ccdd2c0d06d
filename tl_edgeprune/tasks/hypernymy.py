"""Hypernymy: two things of a kind, and the kind's name (Hanna, Pezzelle and Belinkov 2024).

    They talked about apples, pears and other -> fruits, not birds

1. The corrupted prompt has two things of another kind, each of as many tokens. Its kind is the
   distractor; kinds do not overlap.
2. Only kinds of one token are used, and the answer must beat every other kind.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from itertools import permutations
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, mixed_radix, register_recipe
from tl_edgeprune.tasks.words import pieces, single_tokens

SENTENCES = (
    "They talked about {a}, {b} and other",
    "There is a book about {a}, {b} and other",
    "We learned about {a}, {b} and some other",
    "She drew pictures of {a}, {b} and other",
)
KINDS = {
    "fruits": "apples pears plums cherries bananas oranges lemons grapes peaches melons",
    "vegetables": "carrots onions cabbages beans peas potatoes leeks turnips radishes",
    "birds": "sparrows robins crows owls eagles gulls swans pigeons ravens ducks",
    "fish": "trout salmon cod tuna herring carp mackerel eels perch",
    "insects": "ants bees wasps flies beetles moths butterflies crickets",
    "trees": "oaks pines birches elms maples willows cedars beeches",
    "flowers": "roses tulips daisies lilies violets orchids poppies daffodils",
    "tools": "hammers saws drills pliers wrenches axes screwdrivers",
    "instruments": "violins flutes drums guitars trumpets pianos harps cellos",
    "vehicles": "cars trucks buses vans tractors motorcycles trains",
    "clothes": "shirts trousers skirts jackets socks coats sweaters scarves",
    "metals": "iron copper zinc tin lead nickel silver aluminium",
    "drinks": "tea coffee milk beer wine lemonade juice",
    "sports": "football tennis hockey cricket rugby golf swimming",
    "languages": "French German Spanish Italian Russian Dutch Greek Polish",
    "diseases": "measles malaria cholera mumps influenza tuberculosis smallpox",
    "countries": "France Spain Italy Japan Brazil Egypt Poland Norway",
}


class Things(NamedTuple):
    """Two things of one kind."""

    kind: str
    a: str
    b: str


@register_recipe("hypernymy")
def hypernymy(tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """Raises ValueError where fewer than two kinds are one token, or none can be exchanged."""
    kinds = single_tokens(tokenizer, [*KINDS], 2, "hypernymy's kinds", "apples, pears and other")
    prompts = exchangeable(tokenizer, tuple(kinds))
    things = list(prompts)
    sizes = len(SENTENCES), len(things)

    def make(number: int, generator: random.Random) -> Example:
        sentence, place = mixed_radix(number, sizes)
        clean = things[place]
        corrupted = generator.choice(prompts[clean])
        clean_text, corrupted_text = (
            SENTENCES[sentence].format(a=two.a, b=two.b) for two in (clean, corrupted)
        )
        return Example(
            clean.kind,
            clean_text,
            corrupted_text,
            answer=f" {clean.kind}",
            distractor=f" {corrupted.kind}",
            wrong=tuple(token for kind, token in kinds.items() if kind != clean.kind),
        )

    return Recipe(math.prod(sizes), make, f"{len(things)} pairs of things can be exchanged")


def exchangeable(
    tokenizer: PreTrainedTokenizerBase, kinds: tuple[str, ...]
) -> dict[Things, list[Things]]:
    """Ordered pairs of things, with those of another kind and as many tokens, thing by thing."""
    written = pieces(tokenizer, [word for kind in kinds for word in KINDS[kind].split()])
    by_lengths: dict[tuple[int, int], dict[str, list[Things]]] = defaultdict(dict)
    for kind in kinds:
        for a, b in permutations([word for word in KINDS[kind].split() if word in written], 2):
            same = by_lengths[len(written[a]), len(written[b])]
            same.setdefault(kind, []).append(Things(kind, a, b))
    found: dict[Things, list[Things]] = {}
    for same in by_lengths.values():
        for kind, some in same.items():
            others = [two for its_kind, these in same.items() if its_kind != kind for two in these]
            found |= dict.fromkeys(some, others) if others else {}
    if not found:
        raise ValueError("hypernymy: this tokenizer writes no two kinds' things in equal lengths.")
    return found
