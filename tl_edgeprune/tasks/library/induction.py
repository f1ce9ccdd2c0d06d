"""Induction (Elhage et al. 2021, Olsson et al. 2022): what followed this word before?

    Words: river lamp coat bread horse river lamp coat   -> bread, not horse

1. A prompt is a list of random words and then the beginning of the list again. The last word and
   the answer are numbered; the others are drawn at random.
2. The corrupted prompt begins with other words, so that nothing is repeated.
3. Only words of one token are used, and the answer must beat every other word of the list.
"""

from __future__ import annotations

import math
import random

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, mixed_radix, register_recipe
from tl_edgeprune.tasks.single_tokens import single_tokens

WORDS = tuple(
    "river lamp coat bread horse stone window garden paper music doctor winter silver market "
    "bridge candle forest button island letter engine mirror pocket basket ladder castle kitchen "
    "planet bottle camera circle corner desert dinner feather finger flower hammer jacket lemon "
    "machine monkey mountain needle number ocean orange pepper pencil pillow pirate potato prince "
    "rabbit ribbon rocket saddle salad school shadow shoulder spider spring square station storm "
    "summer sugar table targets thunder ticket tiger tower train tunnel turtle uncle valley violin "
    "wagon water wheel wing yellow zebra".split()
)
REPEATED = (2, 3, 4)  # how many words of the list are repeated


@register_recipe("induction")
def induction(tokenizer: PreTrainedTokenizerBase, *, length: int = 6) -> Recipe:
    """Lists of `length` words.

    Raises ValueError for a wrong length, or a tokenizer with too few one-token words.
    """
    if not max(REPEATED) < length <= 20:
        raise ValueError(f"induction: length={length}, expected {max(REPEATED) + 1} to 20.")
    tokens = single_tokens(tokenizer, WORDS, 2 * length, "induction's words")
    words = list(tokens)
    sizes = len(words), len(words) - 1, len(REPEATED)

    def make(number: int, generator: random.Random) -> Example:
        last, answer, turn = mixed_radix(number, sizes)
        repeated = REPEATED[turn]
        pair = [words[last], [*words[:last], *words[last + 1 :]][answer]]
        drawn = generator.sample([word for word in words if word not in pair], 2 * length - 2)
        other_words, strangers = drawn[: length - 2], drawn[length - 2 :]
        first = [*other_words[: repeated - 1], *pair, *other_words[repeated - 1 :]]
        repetition = " ".join(first[:repeated])
        return Example(
            f"repeated-{repeated}",
            f"Words: {' '.join(first)} {repetition}",
            f"Words: {' '.join(strangers)} {repetition}",
            answer=f" {pair[1]}",
            distractor=f" {generator.choice(first[repeated + 1 :])}",
            wrong=tuple(tokens[word] for word in first if word != pair[1]),
        )

    return Recipe(math.prod(sizes), make, f"{len(words)} words are one token each")
