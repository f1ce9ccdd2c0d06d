"""A model's weights shared out over processes, for one that no single GPU can hold.

`sharded` is FSDP's plan for frozen weights (shards.py has its steps). PyTorch's own fully_shard
gathers a block when the gradient of its output arrives, and under masks none arrives: gradients
flow through the split residual stream. A freed tensor keeps its object and loses its storage, so
what autograd has saved of it is whole again when the storage is. (Zhao et al. 2023, "PyTorch FSDP",
arXiv 2304.11277.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tl_edgeprune.distributed import Ranks
from tl_edgeprune.hooks.placement import placed
from tl_edgeprune.hooks.shards import Shards, _sharded


@contextmanager
def sharded(model: Any, device: torch.device | str | None = None) -> Iterator[Any]:
    """The model, each process with its part of the weights, for `EdgePruner.fit` inside.

    Everything inside has to be done by all processes alike (also `evaluate`, and whatever else
    runs the model or looks at its weights): what one does alone waits for the others in vain.
    On leaving, the weights are as they were. With one process they stay whole.

    Args:
        model: whole, with equal weights in all processes; on the CPU where no GPU can hold it.
        device: where it is to run; the model's own by default.

    Raises ValueError for a model that is sharded already.
    """
    ranks = Ranks.current()
    if model in _sharded:
        raise ValueError("the model is sharded already: leave that context first.")
    if ranks.size == 1:
        with placed(model, device=device):
            yield model
        return
    before = next(model.parameters()).device
    to = torch.empty(0, device=device or before).device  # "cuda" is the current GPU
    with ExitStack() as undo:
        shards = Shards(model, ranks, to)
        undo.callback(_restore, shards)
        parts = {id(part.parameter) for block in shards.blocks for part in block}
        undo.enter_context(placed(model, device=to, leave=parts))
        for layer, block in enumerate(model.blocks):
            undo.callback(block.register_forward_pre_hook(_fetcher(shards, layer)).remove)
            undo.callback(block.register_forward_hook(_releaser(shards, layer)).remove)
        _sharded[model] = shards
        undo.callback(_sharded.pop, model)
        yield model


def _restore(shards: Shards) -> None:
    for block in shards.blocks:
        for part in block:
            part.restore(shards.ranks.size)


def _fetcher(shards: Shards, layer: int) -> Callable[..., None]:
    return lambda *_: shards.fetch(layer)


def _releaser(shards: Shards, layer: int) -> Callable[..., None]:
    return lambda *_: shards.after_forward(layer)
