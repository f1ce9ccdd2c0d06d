"""Greater-than (Hanna, Liu and Variengien 2023, arXiv 2305.00586): an end after a beginning.

    The strike began in 1742 and ended in 17   -> 43 to 99, not 00 to 42

1. A prompt has a sentence, an event, a century and a year. Many answers are right: they are sets of
   tokens, and the measure is the probability of the right ones minus that of the wrong ones.
2. The corrupted prompt begins in the year 01, after which nearly every year is right.
3. If the tokenizer writes a year as two pieces (17|42), the answer has two digits. If it writes
   single digits (1|7|4|2), the answer is the decade: later decades are right, earlier ones wrong,
   and the beginning's decade, which could be either, is in neither set.
4. Spans: noun, XX and YY (the beginning's century and year), END, and rest.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, mixed_radix, register_recipe
from tl_edgeprune.tasks.tokens import answers_in_context, encode, filled

SENTENCES = (
    "The {event} began in {century}{year} and ended in {century}",
    "The {event} that started in {century}{year} was not over until {century}",
    "They wrote about the long {event} from {century}{year} to {century}",
)
EVENTS = tuple(
    "war siege strike drought famine revolt blockade plague epidemic crisis conflict dispute trial "
    "debate voyage expedition journey tour mission campaign project programme exhibition festival "
    "reign dynasty alliance truce marriage friendship partnership occupation investigation study "
    "construction restoration experiment tournament rebellion persecution".split()
)
CENTURIES = tuple(range(11, 20))
FIRST = "01"  # the year in corrupted prompts
SPANS = {"event": "noun", "century": "XX", "year": "YY"}  # of the beginning


class Years(NamedTuple):
    """A century as the tokenizer writes it.

    starts: years in which a prompt may begin. right, wrong: for each of them, the tokens that may
    and may not follow the century at the end.
    """

    century: int
    starts: list[str]
    right: dict[str, tuple[int, ...]]
    wrong: dict[str, tuple[int, ...]]


@register_recipe("greater-than")
def greater_than(tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """Raises ValueError if the tokenizer splits years in any other way."""
    centuries = [*filter(None, (read_century(tokenizer, century) for century in CENTURIES))]
    if not centuries:
        written = [tokenizer.decode([token]) for token in encode(tokenizer, "in 1742", False)]
        raise ValueError(
            "greater-than needs years of two pieces (17|42) or of single digits (1|7|4|2), and "
            f"this tokenizer writes 'in 1742' as {written}."
        )
    years = [(century, year) for century in centuries for year in century.starts]
    sizes = len(SENTENCES), len(EVENTS), len(years)

    def make(number: int, generator: random.Random) -> Example:
        sentence, event, start = mixed_radix(number, sizes)
        century, year = years[start]
        words = {"event": EVENTS[event], "century": str(century.century)}
        (clean, clean_spans), (corrupted, _) = (
            filled(SENTENCES[sentence], **words, year=begun) for begun in (year, FIRST)
        )
        spans = (clean_spans[field][0]._replace(name=SPANS[field]) for field in SPANS)
        right, wrong = century.right[year], century.wrong[year]
        return Example(
            f"sentence-{sentence}", clean, corrupted, right=right, wrong=wrong, parts=(*spans,)
        )

    return Recipe(math.prod(sizes), make, f"{len(years)} years are written in the same pieces")


def read_century(tokenizer: PreTrainedTokenizerBase, century: int) -> Years | None:
    """The century's years if they are two pieces or single digits, else None."""
    years = [f"{number:02}" for number in range(100)]
    pieces = answers_in_context(tokenizer, f"It ended in {century}", years)
    n_pieces = len(pieces.get(FIRST, ()))
    first = {year: tokens[0] for year, tokens in pieces.items() if len(tokens) == n_pieces}
    if n_pieces == 1 and len(set(first.values())) == len(first):
        return _by_year(century, first)
    decades = {year[0]: token for year, token in first.items()}
    if n_pieces == 2 and len(set(first.values())) == len(decades) == 10:
        return _by_decade(century, list(first), decades)
    return None


def _by_year(century: int, tokens: dict[str, int]) -> Years | None:
    """Later years are right; the same year and earlier ones are wrong."""
    right = {year: tuple(t for y, t in tokens.items() if y > year) for year in tokens}
    wrong = {year: tuple(t for y, t in tokens.items() if y <= year) for year in tokens}
    starts = [year for year in tokens if year > FIRST and right[year]]
    return Years(century, starts, right, wrong) if starts else None


def _by_decade(century: int, years: list[str], tokens: dict[str, int]) -> Years:
    """Later decades are right, earlier ones wrong."""
    right = {year: tuple(t for d, t in tokens.items() if d > year[0]) for year in years}
    wrong = {year: tuple(t for d, t in tokens.items() if d < year[0]) for year in years}
    starts = [year for year in years if right[year] and wrong[year]]
    return Years(century, starts, right, wrong)
