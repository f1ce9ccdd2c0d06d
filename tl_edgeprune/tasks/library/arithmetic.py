"""Arithmetic: sums and differences of two numbers, as in the MIB benchmark (Mueller et al. 2025).

    Solve this: 24 + 35 =   -> 59, not 81

1. Both numbers and the result have two digits, or one with `digits=1`. The corrupted prompt has
   other numbers, whose result has another first digit and is the distractor.
2. The answer is the result as the tokenizer writes it: the whole number if that is one token, its
   first digit if digits are tokens.
3. All numbers have the same number of tokens.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, mixed_radix, register_recipe
from tl_edgeprune.tasks.single_tokens import same_length

SENTENCES = (
    "Here is the calculation: {a} {sign} {b} =",
    "Solve this: {a} {sign} {b} =",
    "In numbers, {a} {word} {b} is",
)
SIGNS = {"plus": "+", "minus": "-"}


class Sum(NamedTuple):
    """One calculation."""

    operation: str
    a: int
    b: int
    result: int

    def text(self, sentence: str) -> str:
        sign = SIGNS[self.operation]
        return sentence.format(a=self.a, b=self.b, sign=sign, word=self.operation)


@register_recipe("arithmetic")
def arithmetic(
    tokenizer: PreTrainedTokenizerBase, *, operation: str = "both", digits: int = 2
) -> Recipe:
    """`operation`: "plus", "minus" or "both". `digits`: of the numbers and of the result, 1 or 2.

    Raises ValueError for other options, or a tokenizer without numbers of equal length.
    """
    if operation not in ("both", *SIGNS) or digits not in (1, 2):
        raise ValueError(
            f"arithmetic: operation={operation!r}, digits={digits}: expected 'plus', 'minus' or "
            "'both', and 1 or 2 digits."
        )
    numbers = range(10 ** (digits - 1), 10**digits)
    written = same_length(tokenizer, [str(n) for n in numbers], 3, "arithmetic's numbers")
    operations = tuple(SIGNS) if operation == "both" else (operation,)
    sums = {name: _sums(name, [int(n) for n in written], numbers) for name in operations}
    calculations = [calculation for of_operation in sums.values() for calculation in of_operation]
    sizes = len(SENTENCES), len(calculations)

    def make(number: int, generator: random.Random) -> Example:
        template, index = mixed_radix(number, sizes)
        clean, sentence = calculations[index], SENTENCES[template]
        corrupted = clean
        while str(corrupted.result)[0] == str(clean.result)[0]:
            corrupted = generator.choice(sums[clean.operation])
        return Example(
            f"{clean.operation}-{template}",
            clean.text(sentence),
            corrupted.text(sentence),
            answer=f" {clean.result}",
            distractor=f" {corrupted.result}",
        )

    return Recipe(math.prod(sizes), make, f"{len(written)} numbers have the same length")


def _sums(operation: str, numbers: list[int], results: range) -> list[Sum]:
    """All sums with a result in range. Raises ValueError if all results begin with one digit."""
    sign = 1 if operation == "plus" else -1
    candidates = (Sum(operation, a, b, a + sign * b) for a in numbers for b in numbers)
    calculations = [calculation for calculation in candidates if calculation.result in results]
    if len({str(calculation.result)[0] for calculation in calculations}) < 2:
        raise ValueError(f"arithmetic: too few numbers of one length for {operation!r}: {numbers}.")
    return calculations
