"""References that are the same for every prompt: zero, means and constants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.ablation.recording import record
from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.sites import Sites


def zero_reference(
    sites: Sites, graph: EdgeGraph, like: Float[Tensor, "..."], *, bias_in_heads: bool = False
) -> Reference:
    """Every source contributes nothing: one prompt, one position, to be expanded.

    `bias_in_heads`: each head writes an equal share of the output bias, as in the published code.
    """
    heads, d_head, d_model = sites.attention[0].output.shape
    if bias_in_heads:
        zero = zero_reference(sites, graph, like)
        return replace(zero, streams=torch.zeros_like(zero.streams), bias_in_heads=True)
    reference = _with_streams(
        sites,
        graph,
        inputs=like.new_zeros(graph.n_inputs, 1, 1, d_model),
        z=like.new_zeros(graph.n_layers, 1, 1, heads, d_head),
        mlp=like.new_zeros(len(sites.mlp), 1, 1, d_model),
    )
    return replace(reference, any_batch=True, any_position=True)


def constant_reference(
    sites: Sites,
    graph: EdgeGraph,
    inputs: Float[Tensor, "input d_model"],
    z: Float[Tensor, "layer head d_head"],
    mlp: Float[Tensor, "mlp d_model"],
) -> Reference:
    """The same output of each source at every prompt and position, to be expanded."""
    inputs, z, mlp = (t[:, None, None] for t in (inputs, z, mlp))  # [source, batch, pos, …]
    reference = _with_streams(sites, graph, inputs, z, mlp)
    return replace(reference, any_batch=True, any_position=True)


def mean_reference(
    model: Any,
    sites: Sites,
    graph: EdgeGraph,
    prompts: Sequence[Tensor] | Int[Tensor, "prompt pos"],
    *,
    positional: bool,
) -> Reference:
    """The mean of every source's output over prompts, and over positions unless `positional`.

    Prompts may differ in length; a position's mean is over the prompts that reach it.
    """
    if len(prompts) == 0:
        raise ValueError("a mean ablation needs prompts to take the means over, and got none.")
    names = ("inputs", "z", "mlp", *(("hidden",) if sites.hidden else ()))
    longest = max(len(prompt) for prompt in prompts)
    counts = torch.zeros(longest, dtype=torch.float64)
    sums: list[Tensor] | None = None
    for tokens in batches_by_length(prompts):
        reference, _ = record(model, sites, graph, tokens)
        batch_sums = [
            getattr(reference, name).double().sum(1) for name in names
        ]  # [source, pos, …]
        if sums is None:
            sums = [t.new_zeros(t.shape[0], longest, *t.shape[2:]) for t in batch_sums]
        pos = tokens.shape[1]
        counts[:pos] += tokens.shape[0]
        for total, batch_sum in zip(sums, batch_sums, strict=True):
            total[:, :pos] += batch_sum
    assert sums is not None
    means = {
        name: _mean(total, counts.to(total.device), positional).to(reference.inputs.dtype)
        for name, total in zip(names, sums, strict=True)
    }
    hidden = means.pop("hidden", None)
    reference = _with_streams(sites, graph, **means)
    return replace(reference, any_batch=True, any_position=not positional, hidden=hidden)


def _mean(total: Tensor, counts: Tensor, positional: bool) -> Tensor:
    """Means [source, 1, pos or 1, …] from sums over prompts [source, pos, …]."""
    if not positional:
        return (total.sum(1, keepdim=True) / counts.sum()).unsqueeze(1)
    return (total / counts.view(-1, *[1] * (total.dim() - 2))).unsqueeze(1)


def batches_by_length(
    prompts: Sequence[Tensor] | Int[Tensor, "prompt pos"], size: int = 32
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Batches of prompts, each of one length."""
    by_length: dict[int, list[Tensor]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt), []).append(torch.as_tensor(prompt))
    for _, group in sorted(by_length.items()):
        for start in range(0, len(group), size):
            yield torch.stack(group[start : start + size])


def _with_streams(
    sites: Sites, graph: EdgeGraph, inputs: Tensor, z: Tensor, mlp: Tensor
) -> Reference:
    """A reference of these source outputs, with the residual streams that they add up to."""
    stream, streams = inputs.sum(0), []  # [batch, pos, d_model]
    for layer, site in enumerate(sites.attention):
        streams.append(stream)
        rows = site.stream_after(stream.flatten(0, 1), z[layer].flatten(0, 1))  # [row, d_model]
        after_attention = rows.view(stream.shape)
        if graph.has_mlp:
            streams.append(stream if graph.parallel else after_attention)
            stream = after_attention + mlp[layer]
        else:
            stream = after_attention
    return Reference(inputs, z, mlp, torch.stack([*streams, stream]))
