"""A model's weights shared out over processes: the parts of every block, gathered and freed.

1. Each process keeps an equal part of every matrix inside the blocks; embeddings, the unembedding,
   norms and biases stay whole (and W_O if a norm follows the heads, as in Gemma 2).
2. A block's matrices are gathered when its forward begins, and freed when it ends.
3. In the backward pass they are gathered again: the last block's stay, and when the gradient
   arrives at what a block's attention read, that block is freed and the one before it is gathered.
4. If blocks are run by halves (recompute.py), no gradient shows which is next: one block at a time
   is whole.
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

_sharded: weakref.WeakKeyDictionary[Any, Shards] = weakref.WeakKeyDictionary()


@dataclass
class Part:
    """One matrix: the parameter, and this process's part of its numbers (the last one padded).

    `before` is the matrix as it was, where it was on another device.
    """

    parameter: nn.Parameter
    mine: Tensor
    before: Tensor | None

    @staticmethod
    def of(parameter: nn.Parameter, ranks: Ranks, device: torch.device) -> Part:
        before = parameter.data
        length = -(-before.numel() // ranks.size)
        flat = before.flatten()[ranks.rank * length :][:length]
        mine = flat.new_zeros(length, device=device)
        mine[: len(flat)] = flat.to(device)
        # A storage of its own, which can be let go.
        parameter.data = torch.empty(before.shape, dtype=before.dtype, device=device)
        part = Part(parameter, mine, None if before.device == device else before)
        part.let_go()
        return part

    def fetch(self, size: int) -> None:
        data = self.parameter.data
        gathered = self.mine.new_empty(size * len(self.mine))
        dist.all_gather(list(gathered.split(len(self.mine))), self.mine)
        data.untyped_storage().resize_(data.numel() * data.element_size())
        data.copy_(gathered[: data.numel()].view(data.shape))

    def let_go(self) -> None:
        self.parameter.data.untyped_storage().resize_(0)

    def restore(self, size: int) -> None:
        if self.before is None:
            self.fetch(size)
        else:
            self.parameter.data = self.before


class Shards:
    """The parts of every block of a model, and which blocks are whole."""

    def __init__(self, model: Any, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self.blocks = [
            [Part.of(p, ranks, device) for p in _matrices(block)] for block in model.blocks
        ]
        self.whole: set[int] = set()
        self.most_whole = 0  # blocks that were whole at once
        self.in_turns = False

    def fetch(self, layer: int) -> None:
        if layer not in self.whole:
            for part in self.blocks[layer]:
                part.fetch(self.ranks.size)
            self.whole.add(layer)
            self.most_whole = max(self.most_whole, len(self.whole))

    def let_go(self, layer: int) -> None:
        if layer in self.whole:
            for part in self.blocks[layer]:
                part.let_go()
            self.whole.remove(layer)

    def turn_to(self, layer: int) -> None:
        """This block alone."""
        for other in self.whole - {layer}:
            self.let_go(other)
        self.fetch(layer)

    def after_forward(self, layer: int) -> None:
        if layer < len(self.blocks) - 1 or not torch.is_grad_enabled():
            self.let_go(layer)

    def before_read(self, layer: int, x: Tensor) -> None:
        """`x` is what the layer's attention reads: first in its forward, last in its backward."""
        self.fetch(layer)
        if x.requires_grad and not self.in_turns:
            x.register_hook(lambda grad: self._done(layer))

    def _done(self, layer: int) -> None:
        self.let_go(layer)
        if layer > 0:
            self.fetch(layer - 1)
        # Nothing reads block 0 after its own backward, so the next forward starts from nothing.


@contextmanager
def in_turns(model: Any) -> Iterator[Callable[[int], None]]:
    """Blocks by turns, for as long as the context lasts: what is given puts a layer's block of a
    sharded model together and lets the others go, and does nothing for another model.
    """
    shards = _sharded.get(model)
    if shards is None:
        yield lambda layer: None
        return
    shards.in_turns = True
    try:
        yield shards.turn_to
    finally:
        shards.in_turns = False
        for layer in list(shards.whole):
            shards.let_go(layer)


def is_sharded(model: Any) -> bool:
    return model in _sharded


def found(model: Any, layer: int, find: Callable[[Any, int], Any]) -> Any:
    """What `find(model, layer)` finds of a layer's attention; of a sharded one, it fetches."""
    shards = _sharded.get(model)
    if shards is None:
        return find(model, layer)
    was_whole = layer in shards.whole
    shards.fetch(layer)
    site = find(model, layer)
    if site.post is not None:  # a norm over the summed heads: recordings want W_O after the forward
        site = replace(site, output=site.output.clone())
    if not was_whole:
        shards.let_go(layer)

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
