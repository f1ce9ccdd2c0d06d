"""Hypernymy: the name of the kind of two things (Hanna, Pezzelle and Belinkov 2024).

    They talked about apples, pears and other -> fruits, not birds

1. The corrupted prompt has two things of another kind, with as many tokens each. That kind is the
   distractor. Kinds do not overlap.
2. Only kinds of one token are used, and the answer must beat every other kind.
3. form="sentence" is a sentence that continues with the kind; form="instruction" asks for it;
   form="few-shot" first shows other kinds, the same ones in both prompts. For equal numbers and
   seeds, the last two ask about the same things in the same words.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain, permutations
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, mixed_radix, register_recipe
from tl_edgeprune.tasks.single_tokens import pieces, single_tokens

SENTENCES = (
    "They talked about {a}, {b} and other",
    "There is a book about {a}, {b} and other",
    "We learned about {a}, {b} and some other",
    "She drew pictures of {a}, {b} and other",
)
QUERY = "Both {a} and {b} are"
INSTRUCTION = "Say what kind of things these are.\n"
FORMS = ("sentence", "instruction", "few-shot")
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


class Examples(NamedTuple):
    """Two things of one kind."""

    kind: str
    a: str
    b: str


ByKind = dict[str, list[Examples]]


@register_recipe("hypernymy")
def hypernymy(
    tokenizer: PreTrainedTokenizerBase, *, form: str = "sentence", shots: int = 3
) -> Recipe:
    """Kinds of things, after `shots` solved examples of other kinds in the few-shot form.

    Raises ValueError for other options, or if fewer than two kinds are one token, no kinds can
    replace each other, or too few remain for the examples.
    """
    if form not in FORMS or shots < 1:
        raise ValueError(
            f"hypernymy: form={form!r}, shots={shots}: expected form "
            f"{', '.join(map(repr, FORMS))}, and at least one shot."
        )
    kinds = single_tokens(tokenizer, [*KINDS], 2, "hypernymy's kinds", "apples, pears and other")
    groups = by_lengths(tokenizer, tuple(kinds))
    prompts = exchangeable(groups)
    clean_pairs = list(prompts)
    shot_pairs = _largest_group(groups, shots) if form == "few-shot" else {}
    sentences = SENTENCES if form == "sentence" else (QUERY,)
    sizes = len(sentences), len(clean_pairs)

    def make(number: int, generator: random.Random) -> Example:
        sentence, pair_index = mixed_radix(number, sizes)
        clean = clean_pairs[pair_index]
        corrupted = generator.choice(prompts[clean])
        preamble = INSTRUCTION if form == "instruction" else ""
        if form == "few-shot":
            preamble = _shots(shot_pairs, {clean.kind, corrupted.kind}, shots, generator)
        clean_text, corrupted_text = (
            preamble + sentences[sentence].format(a=two.a, b=two.b) for two in (clean, corrupted)
        )
        return Example(
            clean.kind,
            clean_text,
            corrupted_text,
            answer=f" {clean.kind}",
            distractor=f" {corrupted.kind}",
            wrong=tuple(token for kind, token in kinds.items() if kind != clean.kind),
        )

    return Recipe(math.prod(sizes), make, f"{len(clean_pairs)} pairs of things can be exchanged")


def _largest_group(groups: Mapping[tuple[int, int], ByKind], shots: int) -> ByKind:
    """The largest group of things with equal numbers of tokens, to draw examples from.

    Equally long examples keep prompts the same length, which makes large batches.
    """
    best = max(groups.values(), key=len)
    if len(best) < shots + 2:
        raise ValueError(
            f"hypernymy, shots={shots}: {len(best)} kinds have things of one length, and "
            f"{shots + 2} are needed (two are asked about)."
        )
    return best


def _shots(shot_pairs: ByKind, queried: set[str], shots: int, generator: random.Random) -> str:
    """Solved queries about kinds that are not queried."""
    kinds = generator.sample([kind for kind in shot_pairs if kind not in queried], shots)
    pairs = [generator.choice(shot_pairs[kind]) for kind in kinds]
    return "".join(f"{QUERY.format(a=two.a, b=two.b)} {two.kind}\n" for two in pairs)


def by_lengths(
    tokenizer: PreTrainedTokenizerBase, kinds: tuple[str, ...]
) -> dict[tuple[int, int], ByKind]:
    """Ordered pairs of things by their numbers of tokens, and by kind."""
    written = pieces(tokenizer, [word for kind in kinds for word in KINDS[kind].split()])
    groups: dict[tuple[int, int], ByKind] = defaultdict(dict)
    for kind in kinds:
        for a, b in permutations([word for word in KINDS[kind].split() if word in written], 2):
            pairs_by_kind = groups[len(written[a]), len(written[b])]
            pairs_by_kind.setdefault(kind, []).append(Examples(kind, a, b))
    return groups


def exchangeable(groups: Mapping[tuple[int, int], ByKind]) -> dict[Examples, list[Examples]]:
    """Ordered pairs of things, each with the pairs of other kinds that are as long, one by one."""
    partners: dict[Examples, list[Examples]] = {}
    for pairs_by_kind in groups.values():
        for kind, pairs in pairs_by_kind.items():
            other_kinds = [pairs_by_kind[k] for k in pairs_by_kind if k != kind]
            other_pairs = [*chain.from_iterable(other_kinds)]
            partners |= dict.fromkeys(pairs, other_pairs) if other_pairs else {}
    if not partners:
        raise ValueError("hypernymy: this tokenizer writes no two kinds' things in equal lengths.")
    return partners
