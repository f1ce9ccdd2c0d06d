"""Boolean expressions, the case study of Edge Pruning (Bhaskar et al. 2024, section 5).

    ((not False) and True) or False   -> True

1. An expression is a literal, `not` of an expression, or two of them joined by `and` or `or`; what
   has operators itself stands in brackets inside another one. Depth is how deep they are nested. Of
   the two sides of a connective, one is one less deep than the whole, and the other has depth 0 or
   1.
2. Expressions of one depth are numbered: so they are drawn without repetition.
3. The corrupted prompt has an expression of the same shape, its literals and connectives drawn
   anew, and with the other value. So lengths agree, and no single place gives the answer away.
4. form="instruction" asks for the value; form="few-shot" shows expressions with their values first,
   the same ones in both prompts.
"""

from __future__ import annotations

import functools
import random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.recipe import Example, Recipe, register_recipe
from tl_edgeprune.tasks.single_tokens import pieces

INSTRUCTION = (
    "Evaluate the following Boolean expression. Answer with True or False.\n\n"
    "Expression: {expression}\nAnswer:"
)
SHOT = "{expression} is"
FORMS = ("instruction", "few-shot")
SIDE = 1  # the depth of a connective's flatter side, at most
DEPTHS = range(1, 7)


class Expression(NamedTuple):
    """A literal, `not` of one part, or two parts with their connective."""

    operator: str  # "True", "False", "not", "and", "or"
    parts: tuple[Expression, ...] = ()

    @property
    def value(self) -> bool:
        values = [operand.value for operand in self.parts]
        if self.operator == "not":
            return not values[0]
        if self.operator in ("and", "or"):
            return all(values) if self.operator == "and" else any(values)
        return self.operator == "True"

    @property
    def n_operators(self) -> int:
        return bool(self.parts) + sum(operand.n_operators for operand in self.parts)

    def __str__(self) -> str:
        operands = [f"({operand})" if operand.parts else str(operand) for operand in self.parts]
        if self.operator == "not":
            return f"not {operands[0]}"
        return f" {self.operator} ".join(operands) if operands else self.operator


LITERALS = (Expression("True"), Expression("False"))
DUAL = {"True": "False", "False": "True", "and": "or", "or": "and", "not": "not"}
CHOICES = {"True": "True False", "False": "True False", "and": "and or", "or": "and or"}


@register_recipe("boolean-expressions")
def boolean_expressions(
    tokenizer: PreTrainedTokenizerBase, *, form: str = "instruction", depth: int = 3, shots: int = 4
) -> Recipe:
    """Expressions of one depth (1 to 6); `shots` solved ones come first in the few-shot form.

    Raises ValueError for other options, or a tokenizer that writes True and False, or and and or,
    in different numbers of tokens.
    """
    if form not in FORMS or depth not in DEPTHS or shots < 1:
        raise ValueError(
            f"boolean-expressions: form={form!r}, depth={depth}, shots={shots}: expected form "
            f"{' or '.join(map(repr, FORMS))}, depth 1 to {max(DEPTHS)}, and at least one shot."
        )
    _check_lengths(tokenizer)

    def make(number: int, generator: random.Random) -> Example:
        clean = expression(number, depth)
        corrupted = opposite(clean, generator)
        preamble = _shots(clean, corrupted, depth, shots, generator) if form == "few-shot" else ""
        sentence = SHOT if form == "few-shot" else INSTRUCTION
        clean_text, corrupted_text = (
            preamble + sentence.format(expression=e) for e in (clean, corrupted)
        )
        return Example(
            f"{form}-{clean.n_operators}",
            clean_text,
            corrupted_text,
            f" {clean.value}",
            f" {corrupted.value}",
        )

    return Recipe(count(depth), make, f"expressions of depth {depth}")


@functools.cache
def count(depth: int) -> int:
    """How many expressions have this depth."""
    if depth == 0:
        return len(LITERALS)
    return count(depth - 1) * (1 + 2 * (_flat(depth - 1) + _flat(depth - 2)))


def expression(number: int, depth: int) -> Expression:
    """The expression of a number below `count(depth)`; each has one number."""
    if depth == 0:
        return LITERALS[number]
    connective, number = divmod(number, count(depth - 1))
    deep = expression(number, depth - 1)
    if connective == 0:
        return Expression("not", (deep,))
    side, operator_index = divmod(connective - 1, 2)
    operator = ("and", "or")[operator_index]
    if side < _flat(depth - 1):
        return Expression(operator, (deep, _flatter(side)))
    return Expression(operator, (_flatter(side - _flat(depth - 1)), deep))


def opposite(clean: Expression, generator: random.Random) -> Expression:
    """An expression of the same shape with the other value, drawn at random.

    Where what was drawn has the same value, its dual has the other one (De Morgan).
    """
    drawn = _redrawn(clean, generator)
    return drawn if drawn.value != clean.value else _dual(drawn)


def _redrawn(expression: Expression, generator: random.Random) -> Expression:
    operator = generator.choice(CHOICES.get(expression.operator, expression.operator).split())
    return Expression(operator, tuple(_redrawn(operand, generator) for operand in expression.parts))


def _dual(expression: Expression) -> Expression:
    return Expression(DUAL[expression.operator], tuple(map(_dual, expression.parts)))


@functools.cache
def _flat(depth: int) -> int:
    """How many expressions have at most this depth, and at most that of a flatter side."""
    return sum(count(shallow) for shallow in range(min(SIDE, depth) + 1))


def _flatter(number: int) -> Expression:
    """The expression of a number below `_flat`, shallow ones first."""
    depth = 0
    while number >= count(depth):
        number -= count(depth)
        depth += 1
    return expression(number, depth)


def _shots(
    clean: Expression,
    corrupted: Expression,
    depth: int,
    shots: int,
    generator: random.Random,
) -> str:
    """Solved expressions, both values in turn, none of them one of the two."""
    lines: list[str] = []
    value = generator.random() < 0.5
    while len(lines) < shots:
        drawn = expression(generator.randrange(count(depth)), depth)
        if drawn.value == value and drawn not in (clean, corrupted):
            lines.append(f"{SHOT.format(expression=drawn)} {value}\n")
            value = not value
    return "".join(lines)


def _check_lengths(tokenizer: PreTrainedTokenizerBase) -> None:
    for texts in (("True)", "False)"), ("(True", "(False"), ("and", "or")):
        written = pieces(tokenizer, texts, "It is not")
        if len(written) < len(texts) or len({*map(len, written.values())}) > 1:
            pair = " and ".join(map(repr, texts))
            raise ValueError(
                f"boolean-expressions needs {pair} of as many tokens, and this tokenizer writes "
                f"them as {[*written.values()]}."
            )
