"""A model's weights divided among processes, for a model that no single GPU can hold.

`sharded` is FSDP's plan for frozen weights (its steps are in hooks/shards.py). PyTorch's own
fully_shard gathers a block when the gradient of its output arrives, and under masks none arrives:
gradients flow through the split residual stream. A freed tensor keeps its object and loses its
storage, so what autograd has saved of it is whole again when the storage is. (Zhao et al. 2023,
"PyTorch FSDP", arXiv 2304.11277.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tl_edgeprune.distributed import Ranks
from tl_edgeprune.hooks.placement import model_placed
from tl_edgeprune.hooks.shards import SHARDED_MODELS, Shards


@contextmanager
def sharded(model: Any, device: torch.device | str | None = None) -> Iterator[Any]:
    """The model, with a shard of its weights in each process, for `EdgePruner.fit` inside.

    All processes must do the same inside (also `evaluate`, and whatever else runs the model or
    reads its weights): a process that does something else waits for the others forever. On
    leaving, the weights are as they were. With one process they stay whole.

    Args:
        model: whole, with equal weights in all processes; on the CPU if no GPU can hold it.
        device: where it is to run; the model's own by default.

    Raises ValueError for a model that is sharded already.
    """
    ranks = Ranks.current()
    if model in SHARDED_MODELS:
        raise ValueError("the model is sharded already: leave that context first.")
    if ranks.size == 1:
        with model_placed(model, device=device):
            yield model
        return
    previous_device = next(model.parameters()).device
    to = torch.empty(0, device=device or previous_device).device  # "cuda" is the current GPU
    with ExitStack() as undo:
        shards = Shards(model, ranks, to)
        undo.callback(_restore, shards)
        matrices = {id(matrix.parameter) for block in shards.blocks for matrix in block}
        undo.enter_context(model_placed(model, device=to, leave=matrices))
        for layer, block in enumerate(model.blocks):
            undo.callback(block.register_forward_pre_hook(_hook(shards.gather, layer)).remove)
            undo.callback(block.register_forward_hook(_hook(shards.after_forward, layer)).remove)
        SHARDED_MODELS[model] = shards
        undo.callback(SHARDED_MODELS.pop, model)
        yield model


def _restore(shards: Shards) -> None:
    for block in shards.blocks:
        for matrix in block:
            matrix.restore(shards.ranks.size)


def _hook(act: Callable[[int], None], layer: int) -> Callable[..., None]:
    return lambda *_: act(layer)
