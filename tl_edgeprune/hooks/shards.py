"""A model's weights divided among processes: the matrices of every block, gathered and freed.

1. Each process keeps an equal shard of every matrix inside the blocks; embeddings, the unembedding,
   norms and biases stay whole (and W_O if a norm follows the heads, as in Gemma 2).
2. A block's matrices are gathered when its forward pass begins, and freed when it ends.
3. In the backward pass they are gathered again: the last block's stay, and when the gradient
   arrives at what a block's attention read, that block is freed and the one before it is gathered.
4. If blocks are run by halves (recompute.py), no gradient shows which block is next: one block at a
   time is whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tl_edgeprune.distributed import Ranks

SHARDED_MODELS: weakref.WeakKeyDictionary[Any, Shards] = weakref.WeakKeyDictionary()


@dataclass
class ShardedMatrix:
    """One matrix: its parameter, and this process's shard of its numbers (the last is padded).

    `original` is the matrix as it was, if it was on another device.
    """

    parameter: nn.Parameter
    shard: Tensor
    original: Tensor | None

    @staticmethod
    def of(parameter: nn.Parameter, ranks: Ranks, device: torch.device) -> ShardedMatrix:
        original = parameter.data
        length = -(-original.numel() // ranks.size)
        flat = original.flatten()[ranks.rank * length :][:length]
        shard = flat.new_zeros(length, device=device)
        shard[: len(flat)] = flat.to(device)
        # A storage of its own, which can be freed.
        parameter.data = torch.empty(original.shape, dtype=original.dtype, device=device)
        matrix = ShardedMatrix(parameter, shard, None if original.device == device else original)
        matrix.free()
        return matrix

    def gather(self, size: int) -> None:
        data = self.parameter.data
        gathered = self.shard.new_empty(size * len(self.shard))
        dist.all_gather(list(gathered.split(len(self.shard))), self.shard)
        data.untyped_storage().resize_(data.numel() * data.element_size())
        data.copy_(gathered[: data.numel()].view(data.shape))

    def free(self) -> None:
        self.parameter.data.untyped_storage().resize_(0)

    def restore(self, size: int) -> None:
        if self.original is None:
            self.gather(size)
        else:
            self.parameter.data = self.original


class Shards:
    """The matrices of every block of a model, and which blocks are whole."""

    def __init__(self, model: Any, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self.blocks = [
            [ShardedMatrix.of(p, ranks, device) for p in _matrices(block)] for block in model.blocks
        ]
        self.whole: set[int] = set()
        self.most_whole = 0  # the largest number of blocks that were whole at once
        self.one_at_a_time = False

    def gather(self, layer: int) -> None:
        if layer not in self.whole:
            for matrix in self.blocks[layer]:
                matrix.gather(self.ranks.size)
            self.whole.add(layer)
            self.most_whole = max(self.most_whole, len(self.whole))

    def free(self, layer: int) -> None:
        if layer in self.whole:
            for matrix in self.blocks[layer]:
                matrix.free()
            self.whole.remove(layer)

    def gather_only(self, layer: int) -> None:
        """Gather this block and free all others."""
        for other in self.whole - {layer}:
            self.free(other)
        self.gather(layer)

    def after_forward(self, layer: int) -> None:
        if layer < len(self.blocks) - 1 or not torch.is_grad_enabled():
            self.free(layer)

    def before_read(self, layer: int, x: Tensor) -> None:
        """`x` is what the layer's attention reads: first in its forward, last in its backward."""
        self.gather(layer)
        if x.requires_grad and not self.one_at_a_time:
            x.register_hook(lambda grad: self._after_backward(layer))

    def _after_backward(self, layer: int) -> None:
        self.free(layer)
        if layer > 0:
            self.gather(layer - 1)
        # Nothing reads block 0 after its own backward, so the next forward starts from nothing.


@contextmanager
def one_block_at_a_time(model: Any) -> Iterator[Callable[[int], None]]:
    """Yields a function that gathers one block of a sharded model and frees all others.

    For a model that is not sharded the function does nothing.
    """
    shards = SHARDED_MODELS.get(model)
    if shards is None:
        yield lambda layer: None
        return
    shards.one_at_a_time = True
    try:
        yield shards.gather_only
    finally:
        shards.one_at_a_time = False
        for layer in list(shards.whole):
            shards.free(layer)


def is_sharded(model: Any) -> bool:
    return model in SHARDED_MODELS


def sites_of_sharded_layer(model: Any, layer: int, find: Callable[[Any, int], Any]) -> Any:
    """`find(model, layer)`: the sites of a layer's attention, with its weights gathered meanwhile.

    In a sharded model, the site's norm gathers the block before it is read.
    """
    shards = SHARDED_MODELS.get(model)
    if shards is None:
        return find(model, layer)
    was_whole = layer in shards.whole
    shards.gather(layer)
    site = find(model, layer)
    if site.post is not None:  # a norm over the summed heads: recordings use W_O after the forward
        site = replace(site, output=site.output.clone())
    if not was_whole:
        shards.free(layer)

    def norm(x: Tensor) -> Tensor:
        shards.before_read(layer, x)
        return site.norm(x)

    return replace(site, norm=norm)


def _matrices(block: nn.Module) -> list[nn.Parameter]:
    """A block's parameters of two or more dimensions, each once, also those behind a bridge."""
    modules = dict.fromkeys(block.modules())
    for module in list(modules):
        behind = getattr(module, "original_component", None)
        if isinstance(behind, nn.Module):
            modules |= dict.fromkeys(behind.modules())
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    return [p for p in dict.fromkeys(parameters) if p.dim() >= 2]
