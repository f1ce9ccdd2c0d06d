"""Queries, keys and values of many destinations, each from its own read.

1. The definition (`project_naive`): the block's norm on every read, then each destination's own
   head of W_Q, W_K or W_V, plus its bias.
2. A root-mean-square norm only scales a row: (s (x * g)) W = s (x (g W)) for scale s and gain g. So
   if queries, keys and values have reads of their own, `project` multiplies x as it is and scales
   the product, which has d_head numbers per row instead of d_model. With u = x (g W), q = s u and
   s = (mean x^2 + eps)^(-1/2), a gradient dq gives dx = (s dq) (g W)^T - s^2 (dq . q) x / d_model.
3. `project_in_pieces` normalises a few destinations at a time, and its backward pass overwrites the
   reads by their gradient: it serves recomputed blocks, which keep nothing for autograd.
4. `project_some` projects the reads of some destinations only.

Callers go through `AttentionSite.read` and its variants. Tests hold all of them to the definition.
`split_qkv`: the destinations are queries, then keys, then values; otherwise they are heads, whose
query, key and value share one read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_edgeprune.hooks.norms import Norm, RMSNorm

# Numbers that are normalised at once: what a processor's cache holds; on a GPU enough to fill it.
PIECE, PIECE_ON_GPU = 2**20, 2**26

Weights = Sequence[Tensor]  # of queries, keys and values, [head, d_model, d_head] each
Biases = Sequence[Tensor | None]  # [head, d_head] each


def project(
    x: Float[Tensor, "destination row d_model"],
    norm: Norm,
    weights: Weights,
    biases: Biases,
    split_qkv: bool,
) -> list[Float[Tensor, "_head row d_head"]]:
    """Queries, keys and values from what the destinations read."""
    if not split_qkv:
        return project_naive(x, norm, weights, biases, split_qkv)
    if isinstance(norm, RMSNorm) and norm.compute_dtype(x.dtype).itemsize >= x.dtype.itemsize:
        return _with_biases(_ScaledHeads.apply(x, norm, *weights), biases)
    return _with_biases(_ProjectHeads.apply(norm(x), *weights), biases)


def project_naive(
    x: Float[Tensor, "destination row d_model"],
    norm: Norm,
    weights: Weights,
    biases: Biases,
    split_qkv: bool,
) -> list[Float[Tensor, "_head row d_head"]]:
    """The definition."""
    y = norm(x)
    reads = y.split([len(weight) for weight in weights]) if split_qkv else [y] * len(weights)
    products = [torch.bmm(read, weight) for read, weight in zip(reads, weights, strict=True)]
    return _with_biases(products, biases)


def _with_biases(qkv: Sequence[Tensor], biases: Biases) -> list[Tensor]:
    return [
        heads if bias is None else heads + bias[:, None]
        for heads, bias in zip(qkv, biases, strict=True)
    ]


# ---------------------------------------------------------------------- with autograd, fused


class _ProjectHeads(torch.autograd.Function):
    """Each destination's own head of W_Q, W_K or W_V, without a copy of inputs or weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.weights = weights
        return tuple(_products(x, weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _products_back(grads, ctx.weights), *[None] * len(ctx.weights)


class _ScaledHeads(torch.autograd.Function):
    """The same under a root-mean-square norm, whose scale is applied to the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: RMSNorm, *weights: Tensor) -> tuple[Tensor, ...]:
        scale = norm.scale(x)  # [destination, row, 1]
        scales = scale.split([len(w) for w in weights])
        products = _products(x, _times_gain(weights, norm))
        qkv = [(u * s).to(x.dtype) for u, s in zip(products, scales, strict=True)]
        ctx.norm, ctx.weights = norm, weights
        ctx.save_for_backward(x, scale, *qkv)
        return tuple(qkv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *qkv = ctx.saved_tensors
        along = torch.cat(
            [(g.to(scale.dtype) * q).sum(-1, keepdim=True) for g, q in zip(grads, qkv, strict=True)]
        )  # [destination, row, 1]
        scales = scale.split([len(w) for w in ctx.weights])
        scaled = [(g * s).to(x.dtype) for g, s in zip(grads, scales, strict=True)]
        grad = _products_back(scaled, _times_gain(ctx.weights, ctx.norm))
        share = (scale.square() * along / x.shape[-1]).to(x.dtype)
        return grad.addcmul_(x, share, value=-1), None, *[None] * len(ctx.weights)


def _times_gain(weights: Weights, norm: RMSNorm) -> Weights:
    """The weights with the norm's gain in them."""
    gain = norm.weight
    return weights if gain is None else tuple(w * gain[:, None] for w in weights)


def _products(x: Tensor, weights: Weights) -> list[Tensor]:
    reads = x.split([len(w) for w in weights])
    return [torch.bmm(read, w) for read, w in zip(reads, weights, strict=True)]


def _products_back(
    grads: Sequence[Tensor], weights: Weights
) -> Float[Tensor, "destination row d_model"]:
    rows, d_model = grads[0].shape[1], weights[0].shape[1]
    counts = [len(w) for w in weights]
    grad = grads[0].new_empty(sum(counts), rows, d_model)
    for grad_of_reads, g, w in zip(grad.split(counts), grads, weights, strict=True):
        torch.bmm(g, w.transpose(1, 2), out=grad_of_reads)
    return grad


# ------------------------------------------------------------------- in pieces, without autograd


def project_in_pieces(
    x: Float[Tensor, "destination row d_model"],
    norm: Norm,
    weights: Weights,
    biases: Biases,
    split_qkv: bool,
) -> list[Float[Tensor, "_head row d_head"]]:
    """Queries, keys and values, normalised a few destinations at a time."""
    qkv = [x.new_empty(len(w), x.shape[1], w.shape[2]) for w in weights]
    for destinations, users in _pieces(x, weights, split_qkv):
        normalised = norm(x[destinations])
        for index, heads in users:
            torch.bmm(normalised, weights[index][heads], out=qkv[index][heads])
    for projected, bias in zip(qkv, biases, strict=True):
        if bias is not None:
            projected.add_(bias[:, None])
    return qkv


def project_in_pieces_back(
    x: Float[Tensor, "destination row d_model"],
    grads: Sequence[Float[Tensor, "_head row d_head"]],
    norm: Norm,
    weights: Weights,
    split_qkv: bool,
) -> None:
    """Overwrite the reads by their gradient, from that of queries, keys and values."""
    for destinations, users in _pieces(x, weights, split_qkv):
        leaf = x[destinations].detach().requires_grad_()
        grad = torch.zeros_like(leaf) if len(users) > 1 else torch.empty_like(leaf)
        for index, heads in users:
            weight = weights[index][heads].transpose(1, 2)
            if len(users) == 1:
                torch.bmm(grads[index][heads], weight, out=grad)
            else:
                grad.baddbmm_(grads[index][heads], weight)
        with torch.enable_grad():
            normalised = norm(leaf)
        if normalised is not leaf:
            (grad,) = torch.autograd.grad(normalised, leaf, grad)
        x[destinations] = grad


def _pieces(
    x: Float[Tensor, "destination row d_model"], weights: Weights, split_qkv: bool
) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """A few destinations at a time, and what they are read for: queries (0), keys (1) or values
    (2), and their heads.
    """
    piece = PIECE if x.device.type == "cpu" else PIECE_ON_GPU
    size = max(1, piece // x[0].numel())
    first = 0
    for index in range(3 if split_qkv else 1):
        n_heads = len(weights[index])
        for start in range(0, n_heads, size):
            heads = slice(start, min(start + size, n_heads))
            users = [(index, heads)] if split_qkv else [(i, heads) for i in range(3)]
            yield slice(first + heads.start, first + heads.stop), users
        first += n_heads


# ------------------------------------------------------------------------------ some destinations


def project_some(
    x: Float[Tensor, "read row d_model"],
    destinations: Sequence[int],
    norm: Norm,
    weights: Weights,
    biases: Biases,
    split_qkv: bool,
) -> Iterator[tuple[int, slice | Tensor, Float[Tensor, "_head row d_head"]]]:
    """The heads that some destinations, in rising order, are read for.

    Yields: 0, 1 or 2 for queries, keys or values; the heads' index; their values.
    """
    y = norm(x)
    first_read = first_destination = 0
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        heads = [d - first_destination for d in destinations]
        heads = [head for head in heads if 0 <= head < len(weight)]
        if heads:
            chosen = head_index(heads, x.device)
            values = torch.bmm(y[first_read : first_read + len(heads)], weight[chosen])
            if bias is not None:
                values += bias[chosen][:, None]
            yield index, chosen, values
        if split_qkv:
            first_read, first_destination = (
                first_read + len(heads),
                first_destination + len(weight),
            )


def head_index(heads: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index that selects these heads, without a copy if they are consecutive."""
    first = heads[0]
    if list(heads) == list(range(first, first + len(heads))):
        return slice(first, first + len(heads))
    return torch.tensor(heads).to(device, non_blocking=True)
