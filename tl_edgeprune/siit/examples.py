"""The causal models of the shipped semi-synthetic transformers.

`siit-sum` (2 layers): prompts a b c =; the answer is the larger of (a + b) mod 4 and c.
`siit-lookup` (2 layers): prompts of three keys, each with a value, and a key; the answer is the
key's value.
`siit-branch` (3 layers): prompts t s u s'; the answer is t if s' is s, else u, shifted by the tag
s. Control flow: what one head outputs decides where another one attends.

Each has four heads per layer, and most heads and MLPs belong to no variable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.siit.causal import CausalModel, Variable

DIGITS = 4
KEYS, VALUES = 3, 6


def _sum() -> CausalModel:
    """Tokens 0 to 3 are digits, 4 is =."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        digits = torch.randint(DIGITS, (n, 3), generator=generator)
        return torch.cat([digits, torch.full((n, 1), DIGITS)], 1)

    return CausalModel(
        "siit-sum",
        EdgeGraph(n_layers=2, n_heads=4, n_kv_heads=4),
        DIGITS + 1,
        draw,
        (
            Variable("first", "a0.h1", ("input<v>",), lambda tokens: tokens[:, 0]),
            Variable("second", "a0.h3", ("input<v>",), lambda tokens: tokens[:, 1]),
            Variable("sum", "m0", ("first", "second"), lambda a, b: (a + b) % DIGITS),
            Variable("third", "a1.h2", ("input<v>",), lambda tokens: tokens[:, 2]),
            Variable("larger", "m1", ("sum", "third"), torch.maximum),
            Variable("answer", "logits", ("larger",), lambda token: token),
        ),
    )


def _lookup() -> CausalModel:
    """Tokens 0 to 2 are keys, the others values; every prompt has every key once."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        keys = torch.rand(n, KEYS, generator=generator).argsort(1)
        values = KEYS + torch.randint(VALUES, (n, KEYS), generator=generator)
        query = torch.randint(KEYS, (n, 1), generator=generator)
        return torch.cat([torch.stack([keys, values], 2).flatten(1), query], 1)

    def look_up(query: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
        index = (keys == query[:, -1:]).long().argmax(1, keepdim=True)
        return tokens[:, 1 : 2 * KEYS : 2].gather(1, index)[:, 0]

    return CausalModel(
        "siit-lookup",
        EdgeGraph(n_layers=2, n_heads=4, n_kv_heads=4),
        KEYS + VALUES,
        draw,
        (
            Variable("keys", "a0.h2", ("input<v>",), lambda tokens: tokens[:, 0 : 2 * KEYS : 2]),
            Variable("value", "a1.h0", ("input<q>", "keys<k>", "input<v>"), look_up),
            Variable("answer", "logits", ("value",), lambda value: value),
        ),
    )


def _branch() -> CausalModel:
    """Tokens 0 to 3; prompts are first, tag, second, flag."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        tokens = torch.randint(DIGITS, (n, 4), generator=generator)
        repeats_tag = torch.rand(n, generator=generator) < 0.5
        tokens[:, 3] = torch.where(repeats_tag, tokens[:, 1], tokens[:, 3])
        return tokens

    def choose(repeats_tag: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(repeats_tag, tokens[:, 0], tokens[:, 2])

    return CausalModel(
        "siit-branch",
        EdgeGraph(n_layers=3, n_heads=4, n_kv_heads=4),
        DIGITS,
        draw,
        (
            Variable("tag", "a0.h1", ("input<v>",), lambda tokens: tokens[:, 1]),
            Variable("same", "m0", ("input", "tag"), lambda tokens, tag: tokens[:, 3] == tag),
            Variable("value", "a1.h3", ("same<q>", "input<v>"), choose),
            Variable("shift", "a2.h0", ("input<v>",), lambda tokens: tokens[:, 1]),
            Variable("shifted", "m2", ("value", "shift"), lambda a, b: (a + b) % DIGITS),
            Variable("answer", "logits", ("shifted",), lambda token: token),
        ),
    )


EXAMPLES = {model.name: model for model in (_sum(), _lookup(), _branch())}
