"""Boolean expressions, the case study of Edge Pruning (Bhaskar et al. 2024, section 5).

    ((not False) and True) or False   -> True

1. An expression is a literal, `not` of an expression, or two expressions joined by `and` or `or`.
   A nested expression with operators is in brackets. Depth is the depth of nesting. One side of a
   connective is one level less deep than the whole, the other has depth 0 or 1.
2. Expressions of one depth are numbered, so they are drawn without repetition.
3. The corrupted prompt has an expression of the same shape with newly drawn literals and
   connectives, and the opposite value. So lengths agree, and no single token reveals the answer.
4. form="instruction" asks for the value; form="few-shot" first shows expressions with their values,
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
SIDE = 1  # largest depth of a connective's flatter side
DEPTHS = range(1, 7)


class Expression(NamedTuple):
    """A literal, `not` of one operand, or two operands with their connective."""

    operator: str  # "True", "False", "not", "and", "or"
    operands: tuple[Expression, ...] = ()

    @property
    def value(self) -> bool:
        values = [operand.value for operand in self.operands]
        if self.operator == "not":
            return not values[0]
        if self.operator in ("and", "or"):
            return all(values) if self.operator == "and" else any(values)
        return self.operator == "True"

    @property
    def n_operators(self) -> int:
        return bool(self.operands) + sum(operand.n_operators for operand in self.operands)

    def __str__(self) -> str:
        operands = [
            f"({operand})" if operand.operands else str(operand) for operand in self.operands
        ]
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
    """Expressions of one depth (1 to 6), after `shots` solved ones in the few-shot form.

    Raises ValueError for other options, or a tokenizer that writes True and False, or "and" and
    "or", in different numbers of tokens.
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
    """A random expression of the same shape with the opposite value.

    If the drawn expression has the same value, its dual has the opposite one (De Morgan).
    """
    drawn = _redrawn(clean, generator)
    return drawn if drawn.value != clean.value else _dual(drawn)


def _redrawn(expression: Expression, generator: random.Random) -> Expression:
    operator = generator.choice(CHOICES.get(expression.operator, expression.operator).split())
    return Expression(
        operator, tuple(_redrawn(operand, generator) for operand in expression.operands)
    )


def _dual(expression: Expression) -> Expression:
    return Expression(DUAL[expression.operator], tuple(map(_dual, expression.operands)))


@functools.cache
def _flat(depth: int) -> int:
    """How many expressions have at most this depth and at most SIDE."""
    return sum(count(shallow) for shallow in range(min(SIDE, depth) + 1))


def _flatter(number: int) -> Expression:
    """The expression of a number below `_flat(depth)`, shallow ones first."""
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
    """Solved expressions with alternating values, other than the two of the pair."""
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
