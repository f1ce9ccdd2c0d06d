"""Prompts for semi-synthetic models (models/semi_synthetic.py), from the causal model of each.

The output is read at the last position. The corrupted prompt has a different correct answer, which
is the distractor.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from tl_edgeprune.siit.causal import CausalModel
from tl_edgeprune.siit.examples import EXAMPLES
from tl_edgeprune.tasks.registry import check_model_sizes, register
from tl_edgeprune.tasks.task import Task

AT_ONCE = 64


def load(name: str, model: nn.Module, n: int, seed: int, prepend_bos: bool | None) -> Task:
    """n pairs for a shipped model. Raises ValueError for a model of other sizes, or with BOS."""
    causal = EXAMPLES[name]
    sizes = {"d_vocab": causal.n_tokens, "n_layers": causal.graph.n_layers}
    check_model_sizes(name, model, sizes)
    if prepend_bos:
        raise ValueError(
            f"tasks.load({name!r}): the model has no BOS token, so prepend_bos must be False."
        )
    return pairs(causal, n, seed)


def pairs(causal: CausalModel, n: int, seed: int = 0) -> Task:
    """n random pairs of a causal model's prompts; equal seeds give equal pairs."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple[torch.Tensor, ...]] = []
    while len(rows) < n:
        clean, swapped = causal.draw(AT_ONCE, generator), causal.draw(AT_ONCE, generator)
        answers, distractors = causal.answers(clean), causal.answers(swapped)
        differ = answers != distractors
        fields = (clean, swapped, answers, distractors)
        rows += zip(*(field[differ] for field in fields), strict=True)
    prompts, corrupted, right, wrong = zip(*rows[:n], strict=True)
    return Task(
        causal.name,
        clean=prompts,
        corrupted=corrupted,
        read_positions=[torch.tensor([len(prompt) - 1]) for prompt in prompts],
        answers=[answer[None] for answer in right],
        distractors=[answer[None] for answer in wrong],
    )


for _name in EXAMPLES:
    register(_name)(partial(load, _name))
