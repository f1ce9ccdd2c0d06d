"""Reads under a separate mask in every span of the prompt: one product per span.

1. A forward's rows (batch * pos) are put in the order of their spans when sources write, and back
   after what was read has been normalised and projected. Both touch small tensors only.
2. So a span is a slice of the buffer, and of a destination's rows. Each product of `residual.py` is
   one product per span, with the span's mask: as much arithmetic as with one mask for all.

`read_at_spans_naive` is the definition; tests hold the products to it.
Haklay, Orgad, Bau, Mueller and Belinkov 2025, "Position-aware Automatic Circuit Discovery".
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_edgeprune.forward.residual import Products


def read_at_spans_naive(
    differences: Float[Tensor, "source row d_model"],
    reference: Float[Tensor, "row d_model"],
    mask: Float[Tensor, "destination span source"],
    spans: Int[Tensor, " row"],
) -> Float[Tensor, "destination row d_model"]:
    """Residual input of each destination: each row under the mask of its span."""
    return reference + einsum(mask[:, spans], differences, "dst row src, src row d -> dst row d")


class Spans:
    """The rows of one forward, in the order of their spans."""

    def __init__(self, spans: Int[Tensor, "batch pos"], n_spans: int) -> None:
        """Raises ValueError for a span below 0 or from n_spans on."""
        flat = spans.flatten()
        counts = torch.bincount(flat, minlength=n_spans).tolist() if flat.min() >= 0 else []
        if len(counts) != n_spans:
            raise ValueError(
                f"spans go from {int(flat.min())} to {int(flat.max())}, expected 0 to "
                f"{n_spans - 1}: indices of the graph's spans."
            )
        self.order = flat.argsort(stable=True)
        self.back = self.order.argsort()
        starts = [sum(counts[:span]) for span in range(n_spans)]
        segments = [
            (span, slice(start, start + count))
            for span, (start, count) in enumerate(zip(starts, counts, strict=True))
            if count
        ]
        self.products = SpanProducts(flat[self.order], segments)

    def ordered(self, rows: Float[Tensor, " row *rest"]) -> Float[Tensor, " row *rest"]:
        """Rows as the model has them, in the order of their spans."""
        return _Reordered.apply(rows, self.order, self.back)

    def restored(self, rows: Float[Tensor, " row *rest"]) -> Float[Tensor, " row *rest"]:
        """Rows in the order of their spans, as the model has them."""
        return _Reordered.apply(rows, self.back, self.order)


class SpanProducts(Products):
    """The products of reads whose masks are [destination, span, source], over ordered rows."""

    def __init__(self, span_of: Int[Tensor, " row"], segments: list[tuple[int, slice]]) -> None:
        self.span_of, self.segments = span_of, segments

    def mixed(
        self, mask: Tensor, base: Tensor, block: Tensor, rows: Tensor | None
    ) -> Float[Tensor, "destination row d_model"]:
        if rows is not None:
            return base + torch.einsum("drs,srm->drm", mask[:, self.span_of[rows]], block)
        x = base.repeat(len(mask), 1, 1)
        self.add(mask, block, x)
        return x

    def mix(self, mask: Tensor, block: Tensor, out: Tensor) -> None:
        for span, at in self.segments:
            torch.mm(mask[:, span], _flat(block, at), out=_flat(out, at))

    def add(self, mask: Tensor, block: Tensor, x: Tensor) -> None:
        for span, at in self.segments:
            _flat(x, at).addmm_(mask[:, span], _flat(block, at))

    def add_back(self, mask: Tensor, grad: Tensor, gradients: Tensor) -> None:
        for span, at in self.segments:
            of_span = grad[:, at].reshape(len(grad), -1)  # [destination, row * d_model]
            _flat(gradients, at).addmm_(mask[:, span].T, of_span)

    def back_at(
        self, mask: Tensor, grad: Tensor, rows: Int[Tensor, " read"]
    ) -> Float[Tensor, "source read d_model"]:
        return torch.einsum("drs,drm->srm", mask[:, self.span_of[rows]], grad)

    def of_mask(
        self, mask: Shaped[Tensor, "..."], grad: Tensor, block: Tensor, rows: Tensor | None
    ) -> Float[Tensor, "destination span source"]:
        gradient = torch.zeros_like(mask)
        if rows is not None:
            per_row = torch.einsum("drm,srm->drs", grad, block)  # [destination, row, source]
            return gradient.index_add_(1, self.span_of[rows], per_row)
        for span, at in self.segments:
            of_span = grad[:, at].reshape(len(grad), -1)  # [destination, row * d_model]
            torch.mm(of_span, _flat(block, at).T, out=gradient[:, span])
        return gradient


def _flat(rows: Tensor, at: slice) -> Tensor:
    """A span's rows, [any, row * d_model]: a view that may be written to."""
    of_span = rows[:, at]  # [any, row, d_model]
    return of_span.view(len(rows), of_span.shape[1] * of_span.shape[2])


class _Reordered(torch.autograd.Function):
    """rows[order], whose gradient is one selection too; autograd's own would be a sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.back), None, None
