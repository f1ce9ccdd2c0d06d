"""Circuits that are known without a search: from the weights, and by cutting every edge alone.

`possible_edges` asks the weights: can what this source writes reach what this destination reads?
It needs a model without norms (compiled programs are), and gives every edge that can carry
anything, whatever the prompts. `necessary_edges` asks the model: does its output change when this
edge alone is cut?

Every necessary edge is possible. Neither set need be the circuit. A possible edge may carry what
nothing further on uses, or what is the same in the clean and the corrupted run. And where
two edges can stand in for one another, cutting either alone changes nothing: neither is called
necessary, and the necessary edges alone then do not suffice. `evaluate` says whether they do.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.find import find_sites
from tl_edgeprune.hooks.sites import AttentionSite
from tl_edgeprune.methods.exact import exact
from tl_edgeprune.objectives import Objective
from tl_edgeprune.tasks.task import Task

ROUNDING = 1e-9  # of a sum's terms: what is left of one that cancels
Weights = dict[str, Tensor]  # by the name of a source or destination


def necessary_edges(
    model: Any,
    task: Task,
    *,
    ablation: Ablation = "counterfactual",
    objective: str | Objective | None = None,
    tolerance: float = 1e-8,
    graph: EdgeGraph | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Circuit:
    """The edges whose removal, each alone, raises the objective by more than `tolerance`.

    The objective is the task's own by default, its mean over the pairs. Two edges that carry the
    same are each dispensable while the other is there, and so not among them. Takes one run of the
    last part of the model for each edge (`discover(…, method="exact")`, whose scores these are).
    Raises what `discover` raises.
    """
    scores = exact(
        model,
        task,
        objective=objective,
        graph=graph,
        ablation=ablation,
        batch_size=batch_size,
        progress=progress,
    )
    about = scores.metadata | {"method": "necessary", "tolerance": tolerance}
    return Circuit(scores.graph, scores.tensor > tolerance, about)


def possible_edges(model: Any) -> Circuit:
    """The edges that can carry anything: the source's write space meets the destination's read
    space, W_write W_read != 0.

    A head writes through W_V W_O; queries are read through W_Q W_K^T, keys through W_K W_Q^T (and
    b_Q), values through W_V W_O; an MLP reads through the columns of W_in whose rows of W_out are
    not 0, and writes through the others' counterparts. Edges that lead nowhere are among them: see
    `Circuit.without_dead_edges`.

    Raises NotImplementedError for a model with norms (each destination then reads every direction
    through the scale), gated MLPs, grouped keys or position embeddings other than learned ones.
    """
    _refuse_unsupported(model)
    graph = EdgeGraph.from_model(model)
    sites = find_sites(model)
    writes: Weights = {"input": torch.cat([_embedding(model), _positions(model)])}
    reads: Weights = {"logits": _double(model.W_U)}
    for layer, site in enumerate(sites.attention):
        for head in range(graph.n_heads):
            _add_head(writes, reads, f"a{layer}.h{head}", site, head)
        if graph.has_mlp:
            _add_mlp(writes, reads, f"m{layer}", model.blocks[layer].mlp)
    meet = [
        _meet(writes[graph.sources[source]], reads[graph.destinations[destination]])
        for source, destination in graph.pairs
    ]
    about = {"method": "possible", "model": getattr(model.cfg, "model_name", None)}
    return Circuit(graph, torch.tensor(meet), about)


def _refuse_unsupported(model: Any) -> None:
    config = model.cfg
    positions = getattr(config, "positional_embedding_type", "standard")
    grouped = config.n_key_value_heads not in (None, config.n_heads)
    reasons = {
        "has norms: every destination reads all directions through the norm's scale": (
            config.normalization_type is not None
        ),
        "has gated MLPs": bool(getattr(config, "gated_mlp", False)),
        "has keys and values shared by groups of heads": grouped,
        f"has {positions} positions": positions != "standard",
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotImplementedError(
                f"possible_edges: the model {reason}. It is for compiled programs and their like; "
                "necessary_edges works on any model."
            )


def _add_head(writes: Weights, reads: Weights, name: str, site: AttentionSite, head: int) -> None:
    q, k, v = (_double(weight)[head] for weight in site.weights)
    b_q, _, b_v = (None if b is None else _double(b)[head] for b in site.biases)
    out = _double(site.output)[head]
    queries = q if b_q is None else torch.cat([q, b_q[None]])
    values = v if b_v is None else torch.cat([v, b_v[None]])
    writes[name] = values @ out
    reads[f"{name}<q>"], reads[f"{name}<k>"] = q @ k.T, k @ queries.T
    reads[f"{name}<v>"] = v @ out


def _add_mlp(writes: Weights, reads: Weights, name: str, mlp: Any) -> None:
    w_in, w_out, b_in, b_out = (
        _double(getattr(mlp, name)) for name in ("W_in", "W_out", "b_in", "b_out")
    )
    speaks = (w_in != 0).any(0) | (b_in != 0)  # hidden units that are not always 0
    heard = (w_out != 0).any(1)
    writes[name] = torch.cat([w_out[speaks], b_out[None]])
    reads[name] = w_in[:, heard]


def _embedding(model: Any) -> Float[Tensor, "token d_model"]:
    return _double(model.W_E)


def _positions(model: Any) -> Float[Tensor, "pos d_model"]:
    module = model.pos_embed
    weight = getattr(module, "W_pos", None)
    return _double(module.weight if weight is None else weight)


def _double(weight: Tensor) -> Tensor:
    return weight.detach().cpu().double()


def _meet(write: Float[Tensor, "row d_model"], read: Float[Tensor, "d_model column"]) -> bool:
    """Whether the product is not 0, but for rounding."""
    carried: Bool[Tensor, "row column"] = (write @ read).abs() > ROUNDING * (
        write.abs() @ read.abs()
    )
    return bool(carried.any())
