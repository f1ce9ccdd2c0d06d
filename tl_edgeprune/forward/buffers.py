"""Buffers of differences [source, row, d_model], pooled between forwards."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Sources a multiple of a page apart would compete for the same cache lines.
SOURCES_APART = 64


def add_rows(
    buffer: Float[Tensor, "source row d_model"],
    rows: Int[Tensor, " read"],
    more: Float[Tensor, "source read d_model"],
) -> None:
    """buffer[:, rows] += more, in place; a row may occur twice.

    Of two operations, this calls the one that does not copy the whole (strided) buffer on its
    device.
    """
    if buffer.device.type == "cpu":
        buffer.transpose(0, 1).index_put_((rows,), more.transpose(0, 1), accumulate=True)
    else:
        buffer.index_add_(1, rows, more)


class BufferPool:
    """Buffers of finished forwards, kept for the next ones: allocating anew costs a page fault per
    page. All are of one kind (rows, dtype, device); a forward of another kind empties the pool.
    """

    def __init__(self) -> None:
        self._kind: tuple[Any, ...] = ()
        self._free: list[Tensor] = []

    def start(self, like: Float[Tensor, "row d_model"]) -> None:
        """Begin a forward: free the buffers if it is of another kind."""
        kind = (tuple(like.shape), like.dtype, like.device)
        if kind != self._kind:
            self._kind = kind
            self._free.clear()

    def take(
        self, count: int, like: Float[Tensor, "row d_model"], apart: int = 0
    ) -> Float[Tensor, "count row d_model"]:
        """An uninitialised tensor of `count` times `like`, with `apart` unused numbers between."""
        width = like.numel()
        for index, buffer in enumerate(self._free):
            if len(buffer) == count and buffer.stride(0) == width + apart:
                return self._free.pop(index)
        flat = torch.empty(count, width + apart, dtype=like.dtype, device=like.device)
        return flat[:, :width].view(count, *like.shape)

    def give(self, *buffers: Tensor | None) -> None:
        """Take back buffers that nothing will read again."""
        # A buffer made in inference mode cannot be written to outside of it.
        self._free.extend(b for b in buffers if b is not None and not b.is_inference())
