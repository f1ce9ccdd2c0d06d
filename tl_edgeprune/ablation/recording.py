"""The reference of one unmasked run: its activations, recorded by hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.attach import Hook, hooks_attached
from tl_edgeprune.hooks.sites import Sites


def record(
    model: Any,
    sites: Sites,
    graph: EdgeGraph,
    tokens: Int[Tensor, "batch pos"],
    read_positions: Int[Tensor, "batch read"] | None = None,
) -> tuple[Reference, Float[Tensor, "batch read d_vocab"]]:
    """Run the unmasked model (`prepared`) on `tokens`.

    Returns its sources and streams as a Reference, and its logits at `read_positions` (no others
    are computed), or everywhere.
    """
    tokens = tokens.to(sites.attention[0].output.device)  # a Bridge does not move tokens
    recorded: dict[str, Tensor] = {}
    recorders = _recorders(sites, recorded)
    with torch.no_grad(), hooks_attached(model, [*recorders, *_cuts(sites, read_positions)]):
        try:
            logits = model(tokens)
        except _Recorded:
            logits = recorded[sites.final].new_empty(len(tokens), 0, int(model.cfg.d_vocab))
    silent = [name for name, _ in recorders if name not in recorded]
    if silent:
        raise NotImplementedError(
            f"{getattr(model.cfg, 'model_name', 'this model')}: its hook point {silent[0]} does "
            "not fire, so what passes there cannot be masked. Such a model is not supported."
        )
    return _reference_from(sites, graph, recorded), logits


class _Recorded(BaseException):
    """Ends a run once everything is recorded. Some models catch every Exception, so it is none."""


def _cuts(sites: Sites, read_positions: Tensor | None) -> list[Hook]:
    """Hooks that keep the model from computing logits that are not asked for."""
    if read_positions is None:
        return []
    if read_positions.shape[1]:
        return [(sites.cut or sites.final, _cutter(read_positions))]
    return [(sites.final, _leave)]


def _leave(tensor: Tensor, hook: Any) -> None:
    raise _Recorded


def _cutter(read_positions: Int[Tensor, "batch read"]) -> Callable[..., Tensor]:
    """A hook that passes on these positions only."""

    def cut(tensor: Tensor, hook: Any) -> Tensor:
        index = read_positions.to(tensor.device).unsqueeze(-1).expand(-1, -1, tensor.shape[-1])
        return tensor.gather(1, index)

    return cut


def _recorders(sites: Sites, recorded: dict[str, Tensor]) -> list[Hook]:
    def keep(tensor: Tensor, hook: Any, *, name: str) -> None:
        recorded[name] = tensor.detach()

    def recorder(name: str) -> Hook:
        return name, lambda tensor, hook: keep(tensor, hook, name=name)

    names = [f"{block}.hook_resid_pre" for block in sites.blocks] + [sites.embed, sites.final]
    names += [site.z for site in sites.attention]
    names += [name for site in sites.mlp for name in (site.read, site.write)]
    names += sites.hidden
    return [recorder(name) for name in names]


def _reference_from(sites: Sites, graph: EdgeGraph, recorded: dict[str, Tensor]) -> Reference:
    start = recorded["blocks.0.hook_resid_pre"]
    inputs = split_inputs(graph, start, recorded.get(sites.embed))
    z = [
        site.scaled(recorded[site.z].flatten(0, 1)).view(recorded[site.z].shape)
        for site in sites.attention
    ]
    streams = []
    for read in graph.reads:
        if read.kind == "logits":
            streams.append(recorded[sites.final])
        elif read.kind == "attention" or graph.parallel:
            streams.append(recorded[f"{sites.blocks[read.layer]}.hook_resid_pre"])
        else:
            streams.append(recorded[sites.mlp[read.layer].read])
    mlp = _mlp_outputs(sites, recorded, start)
    return Reference(
        inputs, torch.stack(z), mlp, torch.stack(streams), hidden=_hidden(sites, recorded, start)
    )


def _hidden(
    sites: Sites, recorded: dict[str, Tensor], like: Tensor
) -> Float[Tensor, "mlp batch pos d_mlp"] | None:
    if not sites.hidden:
        return None
    hidden = [recorded[name].reshape(*like.shape[:2], -1) for name in sites.hidden]
    widths = {activations.shape[-1] for activations in hidden}
    if len(widths) > 1:
        raise NotImplementedError(
            f"neurons='mlp' needs MLPs of equal width, but this model's have {sorted(widths)} "
            "hidden neurons. Use neurons='dimensions'."
        )
    return torch.stack(hidden)  # [mlp, batch, pos, d_mlp]


def _mlp_outputs(sites: Sites, recorded: dict[str, Tensor], like: Tensor) -> Tensor:
    if not sites.mlp:
        return like.new_empty((0, *like.shape))
    return torch.stack([recorded[site.write] for site in sites.mlp])


def split_inputs(
    graph: EdgeGraph, start: Float[Tensor, "batch pos d_model"], embed: Tensor | None
) -> Float[Tensor, "input batch pos d_model"]:
    """What enters block 0 as the graph's input sources: one, or token and position embeddings."""
    if not graph.split_embeddings:
        return start.unsqueeze(0)
    assert embed is not None
    return torch.stack([embed, start - embed])
