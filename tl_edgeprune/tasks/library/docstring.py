'''Docstring (Heimersheim and Janiak 2023): which argument is described next?

    def load(self, river, coat, bread, horse):
        """Reads the file.

        :param river: the first size
        :param coat: the second size
        :param                            -> bread, not horse

1. The function has four arguments, and its docstring describes them in order: after the first two,
   the third is the answer.
2. The corrupted prompt has other arguments in the definition and the same docstring.
3. Only names of one token are used, and the answer must beat every other argument.
'''

from __future__ import annotations

import math
import random

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, mixed_radix, register_recipe
from tl_edgeprune.tasks.single_tokens import single_tokens

ARGUMENTS = tuple(
    "name size path file color index count value key text date time user group level page image "
    "title model table line point shape width height weight length limit order state event source "
    "target label format mode type style scale speed angle depth price total start end step code "
    "host port node".split()
)
FUNCTIONS = {
    "load": "Reads it from the disk.",
    "save": "Writes it to the disk.",
    "send": "Passes it on to the server.",
    "draw": "Puts it on the screen.",
    "check": "Looks for mistakes in it.",
    "update": "Brings it up to date.",
}
NOTES = ("as it was given", "what is needed", "as in the guide", "one of many", "to be used")
N_ARGUMENTS, DESCRIBED = 4, 2


@register_recipe("docstring")
def docstring(tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """Raises ValueError if the tokenizer splits too many of the names."""
    tokens = single_tokens(tokenizer, ARGUMENTS, 2 * N_ARGUMENTS, "docstring's arguments")
    names = list(tokens)
    sizes = len(FUNCTIONS), len(names), len(names) - 1

    def make(number: int, generator: random.Random) -> Example:
        function, preceding, answer = mixed_radix(number, sizes)
        pair = [names[preceding], [*names[:preceding], *names[preceding + 1 :]][answer]]
        unused_names = [name for name in names if name not in pair]
        drawn = generator.sample(unused_names, 2 * N_ARGUMENTS - 2)
        first, following, strangers = drawn[0], drawn[1], drawn[2:]
        arguments = [first, *pair, following]
        notes = generator.sample(NOTES, DESCRIBED)
        name = list(FUNCTIONS)[function]
        return Example(
            name,
            written(name, arguments, arguments[:DESCRIBED], notes),
            written(name, strangers, arguments[:DESCRIBED], notes),
            answer=f" {pair[1]}",
            distractor=f" {following}",
            wrong=tuple(tokens[argument] for argument in arguments if argument != pair[1]),
        )

    return Recipe(math.prod(sizes), make, f"{len(names)} names are one token each")


def written(name: str, arguments: list[str], described: list[str], notes: list[str]) -> str:
    """The beginning of a function, up to the argument that is described next."""
    lines = [f"def {name}(self, {', '.join(arguments)}):", f'    """{FUNCTIONS[name]}', ""]
    lines += [f"    :param {a}: {note}" for a, note in zip(described, notes, strict=True)]
    return "\n".join([*lines, "    :param"])
