"""Queries, keys and values of many destinations, each from its own read.

1. The definition (`project_naive`): the block's norm on every read, then each destination's own
   head of W_Q, W_K or W_V, plus its bias.
2. A root-mean-square norm only scales a row: (s (x * g)) W = s (x (g W)) for scale s and gain g. So
   where queries, keys and values have reads of their own, x is projected as it is, and what comes
   out, d_head numbers in place of d_model, is scaled. With u = x (g W), q = s u and
   s = (mean x^2 + eps)^(-1/2), a gradient dq gives dx = (s dq) (g W)^T - s^2 (dq . q) x / d_model.
   Tests hold this to the definition.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_edgeprune.hooks.norms import RMSNorm
from tl_edgeprune.hooks.sites import AttentionSite


def project(
    x: Float[Tensor, "destination row d_model"], site: AttentionSite, split_qkv: bool
) -> list[Float[Tensor, "_head row d_head"]]:
    """Queries, keys and values from what the destinations read."""
    if not split_qkv:
        return project_naive(x, site, split_qkv)
    norm = site.norm
    if isinstance(norm, RMSNorm) and norm.compute_dtype(x.dtype).itemsize >= x.dtype.itemsize:
        return _with_biases(list(_ScaledHeads.apply(x, norm, *site.weights)), site)
    return _with_biases(list(_ProjectHeads.apply(site.norm(x), *site.weights)), site)


def project_naive(
    x: Float[Tensor, "destination row d_model"], site: AttentionSite, split_qkv: bool
) -> list[Float[Tensor, "_head row d_head"]]:
    """The definition. `split_qkv`: the destinations are queries, then keys, then values; otherwise
    heads, whose three share one read.
    """
    y = site.norm(x)
    counts = [len(weight) for weight in site.weights]
    parts = y.split(counts) if split_qkv else [y] * len(counts)
    return _with_biases(
        [torch.bmm(part, w) for part, w in zip(parts, site.weights, strict=True)], site
    )


def _with_biases(parts: list[Tensor], site: AttentionSite) -> list[Tensor]:
    return [
        part if bias is None else part + bias[:, None]
        for part, bias in zip(parts, site.biases, strict=True)
    ]


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
    """The same under a root-mean-square norm, whose scale is applied to what comes out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: RMSNorm, *weights: Tensor) -> tuple[Tensor, ...]:
        scale = norm.scale(x)  # [destination, row, 1]
        scales = scale.split([len(w) for w in weights])
        parts = _products(x, _gained(weights, norm))
        parts = [(u * s).to(x.dtype) for u, s in zip(parts, scales, strict=True)]
        ctx.norm, ctx.weights = norm, weights
        ctx.save_for_backward(x, scale, *parts)
        return tuple(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *parts = ctx.saved_tensors
        along = torch.cat(
            [
                (g.to(scale.dtype) * q).sum(-1, keepdim=True)
                for g, q in zip(grads, parts, strict=True)
            ]
        )
        scales = scale.split([len(w) for w in ctx.weights])
        scaled = [(g * s).to(x.dtype) for g, s in zip(grads, scales, strict=True)]
        grad = _products_back(scaled, _gained(ctx.weights, ctx.norm))
        share = (scale.square() * along / x.shape[-1]).to(x.dtype)
        return grad.addcmul_(x, share, value=-1), None, *[None] * len(ctx.weights)


def _gained(weights: tuple[Tensor, ...], norm: RMSNorm) -> tuple[Tensor, ...]:
    """The weights with the norm's gain in them."""
    gain = norm.weight
    return weights if gain is None else tuple(w * gain[:, None] for w in weights)


def _products(x: Tensor, weights: tuple[Tensor, ...]) -> list[Tensor]:
    parts = x.split([len(w) for w in weights])
    return [torch.bmm(part, w) for part, w in zip(parts, weights, strict=True)]


def _products_back(
    grads: list[Tensor] | tuple[Tensor, ...], weights: tuple[Tensor, ...]
) -> Float[Tensor, "destination row d_model"]:
    rows, d_model = grads[0].shape[1], weights[0].shape[1]
    counts = [len(w) for w in weights]
    grad = grads[0].new_empty(sum(counts), rows, d_model)
    for part, g, w in zip(grad.split(counts), grads, weights, strict=True):
        torch.bmm(g, w.transpose(1, 2), out=part)
    return grad
