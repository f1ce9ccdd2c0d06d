"""Buffers of differences [source, row, d_model], pooled between forwards."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Rows of the buffer that are a multiple of a page apart would crowd the same cache lines.
SOURCES_APART = 64


def add_rows(
    buffer: Float[Tensor, "source row d_model"],
    rows: Int[Tensor, " read"],
    more: Float[Tensor, "source read d_model"],
) -> None:
    """buffer[:, rows] += more, in place; a row may come twice.

    Each is the one that does not copy the whole buffer there (its rows lie apart).
    """
    if buffer.device.type == "cpu":
        buffer.transpose(0, 1).index_put_((rows,), more.transpose(0, 1), accumulate=True)
    else:
        buffer.index_add_(1, rows, more)


class BufferPool:
    """Buffers of finished forwards, kept for the next ones: a fresh one costs a page fault a
    page. They belong to forwards of one kind (rows, dtype, device); another kind empties the pool.
    """

    def __init__(self) -> None:
        self._kind: tuple[Any, ...] = ()
        self._free: list[Tensor] = []

    def start(self, like: Float[Tensor, "row d_model"]) -> None:
        """Begin a forward: buffers of forwards of another kind go."""
        kind = (tuple(like.shape), like.dtype, like.device)
        if kind != self._kind:
            self._kind = kind
            self._free.clear()

    def take(
        self, count: int, like: Float[Tensor, "row d_model"], apart: int = 0
    ) -> Float[Tensor, "count row d_model"]:
        """An uninitialised tensor of `count` times `like`, its parts `apart` numbers apart."""
        width = like.numel()
        for place, buffer in enumerate(self._free):
            if len(buffer) == count and buffer.stride(0) == width + apart:
                return self._free.pop(place)
        flat = torch.empty(count, width + apart, dtype=like.dtype, device=like.device)
        return flat[:, :width].view(count, *like.shape)

    def give(self, *buffers: Tensor | None) -> None:
        """Take back buffers that nothing will read again."""
        # One made in inference mode could not be written to outside of it.
        self._free.extend(b for b in buffers if b is not None and not b.is_inference())
