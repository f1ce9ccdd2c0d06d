"""What a removed edge carries: the reference output of its source.

A `Reference` holds, for every source, its reference output, and for every read the residual stream
of the reference run. Heads are held before their output weights (z, d_head numbers), since the
difference of two heads' outputs is the difference of their z times W_O: a d_model-sized copy of
every head is never made.

- counterfactual: the outputs on a corrupted prompt, position by position (one run).
- zero: nothing; the stream then holds only the attention output biases.
- zero-with-biases: not these either: each head writes a share of its block's (published code).
- mean: the mean over prompts and positions. mean-positional: over prompts, position by position.

Bhaskar et al. 2024, section 3 (zero and interchange ablation); Wang et al. 2022 (mean).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.attach import Hook, attached
from tl_edgeprune.hooks.sites import AttentionSite, Sites

# And Constants of optimal_ablation.py.
ZERO_WITH_BIASES = "zero-with-biases"
ABLATIONS = ("counterfactual", "zero", ZERO_WITH_BIASES, "mean", "mean-positional")


@dataclass(frozen=True)
class Reference:
    """Reference outputs of every source, and the reference stream at every read.

    `bias_in_heads`: the output biases are no part of the streams; each head writes its share.
    `any_batch`, `any_position`: one prompt's that stands for all, one position's that stands for
    all. `hidden`: what the MLPs' output weights read, in runs with gates on their neurons.
    """

    inputs: Float[Tensor, "input batch pos d_model"]
    z: Float[Tensor, "layer batch pos head d_head"]
    mlp: Float[Tensor, "mlp batch pos d_model"]
    streams: Float[Tensor, "read batch pos d_model"]
    bias_in_heads: bool = False
    any_batch: bool = False
    any_position: bool = False
    hidden: Float[Tensor, "mlp batch pos d_mlp"] | None = None

    @property
    def batch(self) -> int:
        return self.inputs.shape[1]

    @property
    def n_positions(self) -> int:
        return self.inputs.shape[2]

    def head_bias(self, site: AttentionSite) -> Float[Tensor, " d_model"] | None:
        """What each head of a block writes of its output bias."""
        if not self.bias_in_heads or site.output_bias is None:
            return None
        return site.output_bias / site.output.shape[0]

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def expand(self, batch: int, pos: int) -> Reference:
        """One prompt's reference for every prompt (and, from one position, for every position)."""
        if not self.any_position and pos > self.n_positions:
            raise ValueError(
                f"the prompts have {pos} positions, but the means by position were taken over "
                f"prompts of at most {self.n_positions}: give longer prompts, or use "
                "ablation='mean'."
            )
        return self._with(
            t[:, :, :pos].expand(-1, batch, pos, *t.shape[3:]) for t in self._tensors()
        )

    def select(self, rows: Int[Tensor, " row"]) -> Reference:
        """The references of some prompts."""
        return self._with(t.index_select(1, rows) for t in self._tensors())

    @staticmethod
    def cat(parts: Sequence[Reference]) -> Reference:
        """Prompts of several references, one after another."""
        columns = zip(*(part._tensors() for part in parts), strict=True)
        return parts[0]._with(torch.cat(column, dim=1) for column in columns)

    def _tensors(self) -> tuple[Tensor, ...]:
        hidden = () if self.hidden is None else (self.hidden,)
        return self.inputs, self.z, self.mlp, self.streams, *hidden

    def _with(self, tensors: Iterable[Tensor]) -> Reference:
        inputs, z, mlp, streams, *rest = tensors
        hidden = rest[0] if rest else None
        return replace(self, inputs=inputs, z=z, mlp=mlp, streams=streams, hidden=hidden)


# ------------------------------------------------------------------------------------ one run


def record(
    model: Any,
    sites: Sites,
    graph: EdgeGraph,
    tokens: Int[Tensor, "batch pos"],
    positions: Int[Tensor, "batch read"] | None = None,
) -> tuple[Reference, Float[Tensor, "batch read d_vocab"]]:
    """Run the model as it is (`prepared`) on `tokens`: its sources and streams as a Reference, and
    its logits at `positions` (the others are not computed), or everywhere.
    """
    tokens = tokens.to(sites.attention[0].output.device)  # a Bridge does not move them
    seen: dict[str, Tensor] = {}
    recorders = _recorders(sites, seen)
    with torch.no_grad(), attached(model, [*recorders, *_cuts(sites, positions)]):
        try:
            logits = model(tokens)
        except _Recorded:
            logits = seen[sites.final].new_empty(len(tokens), 0, int(model.cfg.d_vocab))
    silent = [name for name, _ in recorders if name not in seen]
    if silent:
        raise NotImplementedError(
            f"{getattr(model.cfg, 'model_name', 'this model')}: its hook point {silent[0]} does "
            "not fire, so what passes there cannot be masked. Such a model is not supported."
        )
    return _reference_from(sites, graph, seen), logits


class _Recorded(BaseException):
    """Nothing is left to run. Not an Exception: those, some models catch."""


def _cuts(sites: Sites, positions: Tensor | None) -> list[Hook]:
    """Hooks that keep the model from computing logits that nobody wants."""
    if positions is None:
        return []
    if positions.shape[1]:
        return [(sites.cut or sites.final, _cutter(positions))]
    return [(sites.final, _leave)]


def _leave(tensor: Tensor, hook: Any) -> None:
    raise _Recorded


def _cutter(positions: Int[Tensor, "batch read"]) -> Callable[..., Tensor]:
    """A hook that hands on these positions alone."""

    def cut(tensor: Tensor, hook: Any) -> Tensor:
        index = positions.to(tensor.device).unsqueeze(-1).expand(-1, -1, tensor.shape[-1])
        return tensor.gather(1, index)

    return cut


def _recorders(sites: Sites, seen: dict[str, Tensor]) -> list[Hook]:
    def keep(tensor: Tensor, hook: Any, *, name: str) -> None:
        seen[name] = tensor.detach()

    def recorder(name: str) -> Hook:
        return name, lambda tensor, hook: keep(tensor, hook, name=name)

    names = [f"{block}.hook_resid_pre" for block in sites.blocks] + [sites.embed, sites.final]
    names += [site.z for site in sites.attention]
    names += [name for site in sites.mlp for name in (site.read, site.write)]
    names += sites.hidden
    return [recorder(name) for name in names]


def _reference_from(sites: Sites, graph: EdgeGraph, seen: dict[str, Tensor]) -> Reference:
    start = seen["blocks.0.hook_resid_pre"]
    inputs = split_inputs(graph, start, seen.get(sites.embed))
    z = [
        site.scaled(seen[site.z].flatten(0, 1)).view(seen[site.z].shape) for site in sites.attention
    ]
    streams = []
    for read in graph.reads:
        if read.kind == "logits":
            streams.append(seen[sites.final])
        elif read.kind == "attention" or graph.parallel:
            streams.append(seen[f"{sites.blocks[read.layer]}.hook_resid_pre"])
        else:
            streams.append(seen[sites.mlp[read.layer].read])
    mlp = _mlp_outputs(sites, seen, start)
    return Reference(
        inputs, torch.stack(z), mlp, torch.stack(streams), hidden=_hidden(sites, seen, start)
    )


def _hidden(
    sites: Sites, seen: dict[str, Tensor], like: Tensor
) -> Float[Tensor, "mlp batch pos d_mlp"] | None:
    if not sites.hidden:
        return None
    parts = [seen[name].reshape(*like.shape[:2], -1) for name in sites.hidden]
    widths = {part.shape[-1] for part in parts}
    if len(widths) > 1:
        raise NotImplementedError(
            f"neurons='mlp' needs MLPs of one width, and this model's have {sorted(widths)} hidden "
            "neurons. Use neurons='dimensions'."
        )
    return torch.stack(parts)


def _mlp_outputs(sites: Sites, seen: dict[str, Tensor], like: Tensor) -> Tensor:
    if not sites.mlp:
        return like.new_empty((0, *like.shape))
    return torch.stack([seen[site.write] for site in sites.mlp])


def split_inputs(
    graph: EdgeGraph, start: Float[Tensor, "batch pos d_model"], embed: Tensor | None
) -> Float[Tensor, "input batch pos d_model"]:
    """What enters block 0 as the graph's input sources: whole, or tokens and positions apart."""
    if not graph.split_embeddings:
        return start.unsqueeze(0)
    assert embed is not None
    return torch.stack([embed, start - embed])


# ------------------------------------------------------------------------------ fixed references


def zero_reference(
    sites: Sites, graph: EdgeGraph, like: Float[Tensor, "..."], *, bias_in_heads: bool = False
) -> Reference:
    """Every source contributes nothing: one prompt, one position, to be expanded.

    `bias_in_heads`: the output biases go with the heads, in equal shares, as in the published code.
    """
    heads, d_head, d_model = sites.attention[0].output.shape
    if bias_in_heads:
        plain = zero_reference(sites, graph, like)
        return replace(plain, streams=torch.zeros_like(plain.streams), bias_in_heads=True)
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
    parts = {"inputs": inputs, "z": z, "mlp": mlp}
    reference = _with_streams(sites, graph, **{k: t[:, None, None] for k, t in parts.items()})
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
        parts = [getattr(reference, name).double().sum(1) for name in names]  # [source, pos, …]
        if sums is None:
            sums = [t.new_zeros(t.shape[0], longest, *t.shape[2:]) for t in parts]
        pos = tokens.shape[1]
        counts[:pos] += tokens.shape[0]
        for total, part in zip(sums, parts, strict=True):
            total[:, :pos] += part
    assert sums is not None
    kept = dict(zip(names, sums, strict=True))
    like = reference.inputs
    means = {
        name: _mean(t, counts.to(t.device), positional).to(like.dtype) for name, t in kept.items()
    }
    hidden = means.pop("hidden", None)
    reference = _with_streams(sites, graph, **means)
    return replace(reference, any_batch=True, any_position=not positional, hidden=hidden)


def _mean(total: Tensor, counts: Tensor, positional: bool) -> Tensor:
    """Sums [source, pos, …] over prompts as means [source, 1, pos or 1, …]."""
    if not positional:
        return (total.sum(1, keepdim=True) / counts.sum()).unsqueeze(1)
    return (total / counts.view(-1, *[1] * (total.dim() - 2))).unsqueeze(1)


def batches_by_length(
    prompts: Sequence[Tensor] | Int[Tensor, "prompt pos"], size: int = 32
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Batches of prompts of one length each."""
    by_length: dict[int, list[Tensor]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt), []).append(torch.as_tensor(prompt))
    for _, group in sorted(by_length.items()):
        for start in range(0, len(group), size):
            yield torch.stack(group[start : start + size])


def _with_streams(
    sites: Sites, graph: EdgeGraph, inputs: Tensor, z: Tensor, mlp: Tensor
) -> Reference:
    """Add the residual streams that these source outputs and the output biases make."""
    stream, streams = inputs.sum(0), []
    for layer, site in enumerate(sites.attention):
        streams.append(stream)
        after = stream + torch.einsum("bphd,hdm->bpm", z[layer], site.output) * (
            1.0 if site.gain is None else site.gain
        )
        after = after if site.output_bias is None else after + site.output_bias
        if graph.has_mlp:
            streams.append(stream if graph.parallel else after)
            after = after + mlp[layer]
        stream = after
    return Reference(inputs, z, mlp, torch.stack([*streams, stream]))
