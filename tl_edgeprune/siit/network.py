"""A small transformer whose edges can be removed example by example: what training trains.

Pre-norm blocks, causal attention, learned positions, GELU MLPs; biases only in norms and MLPs.
Weights are named and shaped as a HookedTransformer's. Every destination's input follows the
definition: the stream plus, for each removed edge, its source's output on another prompt minus its
output on this one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from tl_edgeprune.graph.edge_graph import EdgeGraph

State = dict[str, Float[Tensor, "..."]]
EPS = 1e-5
SPREAD = 0.8  # standard deviation of the initial embeddings


def fresh_weights(settings: dict[str, Any], generator: torch.Generator) -> State:
    """Random weights for a model of these sizes (named as TransformerLens names them)."""
    d, heads, d_head, d_mlp = (settings[k] for k in ("d_model", "n_heads", "d_head", "d_mlp"))
    vocab, context = settings["d_vocab"], settings["n_ctx"]

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    state = {
        "embed.W_E": normal(vocab, d, std=SPREAD),
        "pos_embed.W_pos": normal(context, d, std=SPREAD),
        "unembed.W_U": normal(d, settings["d_vocab_out"], std=d**-0.5),
    }
    for norm in _norms(settings["n_layers"]):
        state |= {f"{norm}.w": torch.ones(d), f"{norm}.b": torch.zeros(d)}
    for layer in range(settings["n_layers"]):
        block = f"blocks.{layer}"
        for letter in "QKV":
            state[f"{block}.attn.W_{letter}"] = normal(heads, d, d_head, std=d**-0.5)
        state[f"{block}.attn.W_O"] = normal(heads, d_head, d, std=(heads * d_head) ** -0.5)
        state[f"{block}.mlp.W_in"] = normal(d, d_mlp, std=d**-0.5)
        state[f"{block}.mlp.b_in"] = torch.zeros(d_mlp)
        state[f"{block}.mlp.W_out"] = normal(d_mlp, d, std=d_mlp**-0.5)
        state[f"{block}.mlp.b_out"] = torch.zeros(d)
    return state


def _norms(n_layers: int) -> list[str]:
    return [f"blocks.{i}.{norm}" for i in range(n_layers) for norm in ("ln1", "ln2")] + ["ln_final"]


def run(
    state: State,
    graph: EdgeGraph,
    tokens: Int[Tensor, "batch pos"],
    cut: Bool[Tensor, "batch edge"] | None = None,
    other: Float[Tensor, "source batch pos d_model"] | None = None,
) -> tuple[Float[Tensor, "batch vocab"], Float[Tensor, "source batch pos d_model"]]:
    """Logits at the last position, and the output of each source.

    Args:
        state: the weights.
        graph: their graph.
        tokens: prompts.
        cut: edges that carry their source's output from `other`; None: no edge.
        other: the sources' outputs in another run.
    """
    outputs = [state["embed.W_E"][tokens] + state["pos_embed.W_pos"][: tokens.shape[1]]]

    def read(read_index: int) -> Float[Tensor, "destination batch pos d_model"]:
        block = graph.reads[read_index]
        stream = torch.stack(outputs).sum(0)
        if cut is None or other is None:
            return stream.expand(block.n_destinations, *stream.shape)
        swap = other[: len(outputs)] - torch.stack(outputs)
        rows = cut[:, block.edges].view(-1, block.n_destinations, block.n_sources).to(swap.dtype)
        return stream + einsum(rows, swap, "b dst src, src b p d -> dst b p d")

    for layer in range(graph.n_layers):
        inputs = _norm(state, f"blocks.{layer}.ln1", read(2 * layer))
        outputs += _heads(state, f"blocks.{layer}.attn", *inputs.chunk(3))
        hidden = _norm(state, f"blocks.{layer}.ln2", read(2 * layer + 1)[0])
        mlp = {k: state[f"blocks.{layer}.mlp.{k}"] for k in ("W_in", "b_in", "W_out", "b_out")}
        outputs.append(gelu(hidden @ mlp["W_in"] + mlp["b_in"]) @ mlp["W_out"] + mlp["b_out"])
    final = _norm(state, "ln_final", read(2 * graph.n_layers)[0, :, -1])
    return final @ state["unembed.W_U"], torch.stack(outputs)


def _norm(state: State, name: str, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    return layer_norm(x, x.shape[-1:], state[f"{name}.w"], state[f"{name}.b"], EPS)


def _heads(
    state: State,
    attention: str,
    for_q: Float[Tensor, "head batch pos d_model"],
    for_k: Float[Tensor, "head batch pos d_model"],
    for_v: Float[Tensor, "head batch pos d_model"],
) -> list[Float[Tensor, "batch pos d_model"]]:
    """What each head of a layer adds to the stream, given its separate q, k and v inputs."""
    q, k, v = (
        einsum(x, state[f"{attention}.W_{letter}"], "h b p d, h d e -> h b p e")
        for letter, x in zip("QKV", (for_q, for_k, for_v), strict=True)
    )
    scores = einsum(q, k, "h b q e, h b k e -> h b q k") / math.sqrt(q.shape[-1])
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    pattern = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    mixed = einsum(pattern, v, "h b q k, h b k e -> h b q e")
    return list(einsum(mixed, state[f"{attention}.W_O"], "h b p e, h e d -> h b p d"))
